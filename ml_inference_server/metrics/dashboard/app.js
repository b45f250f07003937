// The live page. Everything that comes from the server is written as text, never as markup.

import { Sparkline } from "./sparkline.js";

const POLL_MS = 1000;
const TIMEOUT_MS = 3000;
const NOTHING = "–";

const byId = (id) => document.getElementById(id);
const pick = (tree, path) => path.split(".").reduce((value, key) => value?.[key], tree) ?? null;
const decimals = (value) => (Math.abs(value) >= 100 || Number.isInteger(value) ? 0 : Math.abs(value) >= 10 ? 1 : 2);

function number(value, digits) {
  if (value === null) return NOTHING;
  const places = digits ?? decimals(value);
  return value.toLocaleString("en-US", { minimumFractionDigits: places, maximumFractionDigits: places });
}

const percent = (share) => number(share === null ? null : share * 100, 1);

function bytes(value) {
  if (value === null) return [NOTHING, "MiB"];
  const gib = value / 2 ** 30;
  return gib >= 1 ? [number(gib, 2), "GiB"] : [number(value / 2 ** 20, 0), "MiB"];
}

function duration(seconds) {
  const s = Math.floor(seconds);
  const [d, h, m] = [Math.floor(s / 86400), Math.floor(s / 3600) % 24, Math.floor(s / 60) % 60];
  if (d) return `${d} d ${h} h`;
  if (h) return `${h} h ${m} min`;
  return m ? `${m} min ${s % 60} s` : `${s} s`;
}

const count = (amount, one, many) => `${number(amount)} ${amount === 1 ? one : many}`;

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

// ---- figures

const fields = [...document.querySelectorAll("[data-field]")];
const sparks = [...document.querySelectorAll("[data-spark]")].map((svg) => ({
  line: new Sparkline(svg, svg.dataset.spark.split(" ")),
  peak: svg.previousElementSibling,
}));
const formats = new Map(fields.map((field) => [field.dataset.field, field.dataset]));

function setText(target, text) {
  if (target.textContent !== text) target.textContent = text;
}

// [text, unit where it depends on the size]
function formatted(name, value) {
  const { format, digits } = formats.get(name) ?? {};
  if (format === "bytes") return bytes(value);
  return [format === "percent" ? percent(value) : number(value, digits && Number(digits))];
}

function showFigures(figures) {
  for (const field of fields) {
    const name = field.dataset.field;
    const [text, unit] = formatted(name, pick(figures, name));
    setText(field, text);
    if (unit) setText(document.querySelector(`[data-unit="${name}"]`), unit);
  }
  const inFlight = Object.entries(figures.in_flight).filter(([, times]) => times);
  const inFlightTotal = inFlight.reduce((sum, [, times]) => sum + times, 0);
  setText(byId("in-flight"), number(inFlightTotal));
  setText(byId("in-flight-by"), inFlight.map(([method, count]) => `${method} ${number(count)}`).join(" · ") || "none");
  for (const { line, peak } of sparks) {
    line.push(line.fields.map((name) => (name === "in_flight" ? inFlightTotal : pick(figures, name))));
    setText(peak, line.peak ? `peak ${formatted(line.fields.at(-1), line.peak).join(" ")}` : "");
  }
  byId("gpu").hidden = figures.gpu === null;
  if (figures.gpu) {
    setText(byId("gpu-name"), `${figures.gpu.name} · of ${bytes(figures.gpu.total_bytes).join(" ")}`);
  }
  setText(byId("closed-by"), closedBy(figures.batch.closed_by));
  setText(byId("error-codes"), errorCodes(figures.totals));
  byId("errors").classList.toggle("bad", figures.errors_per_s > 0);
  setText(byId("uptime"), duration(figures.uptime_s));
}

function closedBy(counts) {
  const total = Object.values(counts).reduce((sum, times) => sum + times, 0);
  const parts = Object.entries(counts).filter(([, times]) => times).sort(([, a], [, b]) => b - a);
  if (!total) return "no batch in the window";
  return `closed by ${parts.map(([reason, count]) => `${reason} ${number((100 * count) / total, 0)}\u00a0%`).join(", ")}`;
}

function errorCodes(totals) {
  const codes = new Map();
  for (const counts of Object.values(totals.by_method_and_code)) {
    for (const [code, count] of Object.entries(counts)) {
      if (code !== "OK") codes.set(code, (codes.get(code) ?? 0) + count);
    }
  }
  const parts = [...codes].sort(([, a], [, b]) => b - a).map(([code, count]) => `${number(count)} ${code.toLowerCase().replaceAll("_", " ")}`);
  return parts.length ? `since the start: ${parts.join(", ")}` : "none since the start";
}

// ---- what is running

function showInfo(info) {
  const { requested, resolved } = info;
  const names = [info.experiment, info.variant].filter(Boolean).join(" / ");
  setText(byId("experiment"), names ? ` · ${names}` : "");
  setText(byId("title"), info.title || requested.model);
  showFallbacks(info.fallbacks, resolved);
  const loading = "loading …";
  const precision = resolved && resolved.dtype + (resolved.quantized_layers ? `, ${number(resolved.quantized_layers)} quantized layers` : "");
  const rows = [
    ["Model", requested.model, resolved ? resolved.model : loading, false],
    ["Backend", requested.backend, resolved ? resolved.backend : loading, resolved && !["auto", resolved.backend].includes(requested.backend)],
    ["Device", requested.device, resolved ? resolved.device : loading, resolved && !["auto", resolved.device].includes(requested.device)],
    ["Precision", requested.quantization === "none" ? "not quantized" : requested.quantization, resolved ? precision : loading, false],
  ];
  byId("requested").replaceChildren(
    ...rows.map(([name, asked, runs, differs]) => {
      const row = element("tr", undefined, differs ? "differs" : "");
      const head = element("th", name);
      head.scope = "row";
      row.append(head, element("td", asked), element("td", runs));
      return row;
    }),
  );
  byId("details").replaceChildren(...details(info).map(([term, text]) => {
    const group = element("div");
    group.append(element("dt", term), element("dd", text));
    return group;
  }));
  byId("settings").hidden = !info.settings;
  if (info.settings) setText(byId("settings").querySelector("pre"), JSON.stringify(info.settings, null, 2));
}

function details({ resolved, server_version, pid, instance_id }) {
  const own = [["Server", `${server_version} · process ${pid} · instance ${instance_id}`]];
  if (!resolved) return own;
  const versions = Object.entries(resolved.versions ?? {}).map(([name, version]) => `${name} ${version}`).join(" · ");
  return [
    ["Task", resolved.task],
    ["Hardware", `${resolved.device_name} · ${resolved.instruction_set}`],
    ["Engine", resolved.execution_provider],
    ["Parallelism", `${count(resolved.concurrency, "batch", "batches")} in flight, ${count(resolved.threads, "thread", "threads")} each`],
    ["Input", `up to ${number(resolved.max_tokens)} tokens`],
    ["Output", `${number(resolved.dimension)} dimensions`],
    ["Parameters", number(resolved.parameters)],
    ["Weights", `${resolved.weights_file} · ${resolved.source}`],
    ["SHA-256", resolved.weights_sha256 && `${resolved.weights_sha256.slice(0, 16)} …`],
    ["Versions", versions],
    ...own,
  ].filter(([, text]) => text);
}

function showFallbacks(sentences, resolved) {
  const all = [...sentences];
  if (resolved?.random_weights) all.push("The weights are random: speed is real, answers mean nothing.");
  const list = byId("fallbacks");
  list.hidden = all.length === 0;
  list.querySelector("ul").replaceChildren(...all.map((sentence) => element("li", sentence, "banner warning")));
}

// ---- state

function showStatus(state, text) {
  byId("status").dataset.state = state;
  setText(byId("status-text"), text);
}

let lastAnswer = null;

function showAnswering(figures) {
  lastAnswer = new Date();
  const { ready, reason } = figures.readiness;
  byId("no-answer").hidden = true;
  document.body.classList.remove("stale");
  showStatus(ready ? "ready" : "waiting", ready ? "ready" : `not ready: ${reason}`);
  document.title = `${number(figures.requests_per_s)} requests/s – ML inference server`;
}

function showSilent(problem) {
  for (const { line } of sparks) line.push(line.fields.map(() => null));
  const since = lastAnswer ? ` The figures below are from ${lastAnswer.toLocaleTimeString("en-GB")}.` : "";
  const banner = byId("no-answer");
  banner.hidden = false;
  setText(banner, `${problem}.${since} Trying again every second.`);
  document.body.classList.add("stale");
  showStatus("gone", "no answer");
  document.title = "no answer – ML inference server";
}

async function get(path) {
  let response;
  try {
    response = await fetch(path, {
      headers: { Accept: "application/json" },
      cache: "no-store",
      credentials: "omit",
      signal: AbortSignal.timeout(TIMEOUT_MS),
    });
  } catch {
    throw new Error("The server does not answer");
  }
  if (!response.ok) throw new Error(`The server answers with an error (HTTP ${response.status})`);
  return response.json();
}

let infoFor = null; // the state of the server that the shown information belongs to
let lastUptime = -1;

async function poll() {
  try {
    const figures = await get("metrics");
    if (figures.uptime_s < lastUptime) infoFor = null;
    lastUptime = figures.uptime_s;
    const state = String(figures.readiness.ready);
    if (infoFor !== state) {
      const info = await get("info");
      showInfo(info);
      infoFor = info.resolved ? state : null;
    }
    showFigures(figures);
    showAnswering(figures);
  } catch (error) {
    infoFor = null;
    showSilent(error.message);
  }
  setTimeout(poll, POLL_MS);
}

poll();

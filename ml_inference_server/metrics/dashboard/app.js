// The live page. Everything that comes from the server is written as text, never as markup.

import { showBars, showHistogram, showWaterfall } from "./bars.js";
import { Chart } from "./charts.js";
import { follow, get } from "./feed.js";
import { byId, bytes, children, duration, element, number, percent, pick, setText, words } from "./format.js";
import { showInfo } from "./model_card.js";

const RANGES = { fine: { span: 300, kept: 300 }, coarse: { span: 3600, kept: 360 } };

// ---- charts

const charts = [
  { title: "Throughput", unit: "/s", series: [
    { column: "answered_per_s", label: "answered" },
    { column: "texts_per_s", label: "texts" },
    { column: "pairs_per_s", label: "pairs" },
  ] },
  { title: "Latency", unit: "ms", series: [
    { column: "latency_p50_ms", label: "p50" },
    { column: "latency_p95_ms", label: "p95" },
    { column: "latency_p99_ms", label: "p99" },
  ] },
  { title: "Queue and in flight", unit: "", digits: 0, least: 2, series: [
    { column: "queue_texts", label: "texts waiting" },
    { column: "in_flight", label: "requests in flight" },
  ] },
  { title: "Tokens", unit: "/s", digits: 0, series: [{ column: "tokens_per_s", label: "computed, without padding" }] },
  { title: "CPU", unit: "%", digits: 0, least: 100, series: [{ column: "cpu_percent", label: "of one core" }] },
  { title: "Memory", unit: "MiB", digits: 0, series: [
    { column: "rss_bytes", label: "resident", scale: 2 ** -20 },
    { column: "gpu_memory_bytes", label: "GPU", scale: 2 ** -20 },
  ] },
].map((description) => new Chart(byId("charts"), description));

let history = { columns: [], fine: { step_s: 1, rows: [] }, coarse: { step_s: 10, rows: [] } };
let range = "fine";

function drawCharts() {
  if (document.hidden) return;
  const { step_s: step, rows } = history[range];
  for (const chart of charts) chart.draw(rows, history.columns, RANGES[range].span, step);
}

function append(name, row) {
  const { rows } = history[name];
  if (!row || (rows.length && row[0] <= rows.at(-1)[0])) return;
  rows.push(row);
  if (rows.length > RANGES[name].kept) rows.shift();
}

for (const button of document.querySelectorAll("[data-range]")) {
  button.addEventListener("click", () => {
    range = button.dataset.range;
    for (const other of document.querySelectorAll("[data-range]")) {
      other.setAttribute("aria-pressed", String(other === button));
    }
    drawCharts();
  });
}
document.addEventListener("visibilitychange", drawCharts);
new ResizeObserver(drawCharts).observe(byId("charts"));

// ---- figures

const fields = [...document.querySelectorAll("[data-field]")];

function formatted({ format, digits }, value) {
  const places = digits === undefined ? undefined : Number(digits);
  if (format === "bytes") return bytes(value);
  return format === "percent" ? percent(value, places) : number(value, places);
}

function showFigures(figures) {
  for (const field of fields) setText(field, formatted(field.dataset, pick(figures, field.dataset.field)));
  showWaterfall(figures.stages_ms);
  showBatches(figures);
  showRequests(figures);
  byId("gpu").hidden = figures.gpu === null;
  if (figures.gpu) setText(byId("gpu-name"), figures.gpu.name);
  setText(byId("uptime"), duration(figures.uptime_s));
  byId("not-recording").hidden = figures.recording;
  byId("hints").hidden = figures.hints.length === 0;
  children(byId("hints").querySelector("ul"), figures.hints, () => element("li"), setText);
  showBenchmark(figures.benchmark);
}

function showBatches({ batch, distributions, tokens_per_s: tokensPerS }) {
  showHistogram(byId("batch-texts"), distributions.batch_texts, "texts");
  showHistogram(byId("text-tokens"), distributions.text_tokens, "tokens");
  const textsPerS = (batch.mean_size ?? 0) * batch.per_s;
  setText(byId("mean-length"), number(textsPerS ? tokensPerS / textsPerS : null));
  const closed = showBars(byId("closed-by"), Object.entries(batch.closed_by), { asShare: true });
  setText(byId("closed-note"), closed ? `${number(closed)} batches in the window` : "no batch in the window");
  byId("padding").hidden = batch.padding_share === null;
  const [useful, waste] = byId("padding").children;
  useful.style.inlineSize = `${100 * (1 - (batch.padding_share ?? 0))}%`;
  waste.style.inlineSize = `${100 * (batch.padding_share ?? 0)}%`;
  setText(
    byId("padding-note"),
    batch.mean_padding_ms === null
      ? "no batch in the window"
      : `costs about ${number(batch.mean_padding_ms)} ms of each ${number(batch.mean_compute_ms)} ms batch`,
  );
}

function showRequests(figures) {
  const inFlight = Object.entries(figures.in_flight);
  setText(byId("in-flight"), number(inFlight.reduce((sum, [, amount]) => sum + amount, 0)));
  showBars(byId("in-flight-by"), inFlight);
  const reasons = Object.entries(figures.totals.errors_by_reason).map(([reason, amount]) => [words(reason), amount]);
  const errors = showBars(byId("errors"), reasons);
  setText(byId("errors-note"), errors ? "since the start" : "none since the start");
  byId("errors-now").classList.toggle("bad", figures.errors_per_s > 0);
  const recent = Object.entries(figures.errors_by_reason).sort(([, a], [, b]) => b - a);
  setText(
    byId("error-share"),
    recent.length
      ? `${percent(figures.errors_per_s / figures.requests_per_s)} % of the requests: ${recent.map(([reason]) => words(reason)).join(", ")}`
      : "none in the window",
  );
}

function showBenchmark(benchmark) {
  byId("benchmark").hidden = benchmark === null;
  if (benchmark === null) return;
  const { name, row, rows, label, done, eta_s: eta } = benchmark;
  setText(byId("benchmark-name"), `Benchmark ${name}`);
  setText(byId("benchmark-row"), `row ${number(row)} of ${number(rows)}: ${label} · ${percent(done, 0)} % of the row`);
  setText(byId("benchmark-eta"), eta === null ? "" : `about ${duration(eta)} left`);
  byId("benchmark-done").value = (row - 1 + done) / rows;
}

// ---- state

function showStatus(state, text) {
  byId("status").dataset.state = state;
  setText(byId("status-text"), text);
}

let lastAnswer = null;

function showAnswering(figures, way) {
  lastAnswer = new Date();
  const { ready, reason } = figures.readiness;
  byId("no-answer").hidden = true;
  document.body.classList.remove("stale");
  const up = figures.workers.filter((worker) => worker.ready).length;
  const ofWorkers = figures.workers.length ? `, ${up} of ${figures.workers.length} workers` : "";
  showStatus(ready ? "ready" : "waiting", ready ? `ready${ofWorkers}` : `not ready: ${reason}`);
  setText(byId("feed"), way === "stream" ? "live" : "live, by polling");
  document.title = `${number(figures.answered_per_s)} answers/s – ML inference server`;
}

function showSilent(problem) {
  const since = lastAnswer ? ` The figures below are from ${lastAnswer.toLocaleTimeString("en-GB")}.` : "";
  const banner = byId("no-answer");
  banner.hidden = false;
  setText(banner, `${problem}.${since} Trying again every second.`);
  document.body.classList.add("stale");
  showStatus("gone", "no answer");
  setText(byId("feed"), "no answer");
  document.title = "no answer – ML inference server";
}

function showLocked(problem) {
  byId("no-answer").hidden = true;
  document.body.classList.add("stale");
  showStatus("waiting", "a key is needed");
  setText(byId("feed"), problem);
  // Their pages are opened by the browser, which has no key to send.
  for (const link of document.querySelectorAll("footer a")) link.hidden = true;
}

let infoFor = null; // the state of the server that the shown information belongs to

follow({
  async connected() {
    history = await get("api/v1/history");
    infoFor = null;
  },
  async message({ figures, row, coarse_row: coarseRow }, way) {
    const state = String(figures.readiness.ready);
    if (infoFor !== state) {
      const info = await get("info");
      showInfo(info);
      infoFor = info.resolved ? state : null;
    }
    append("fine", row);
    append("coarse", coarseRow);
    showFigures(figures);
    showAnswering(figures, way);
    drawCharts();
  },
  silent: showSilent,
  locked: showLocked,
});

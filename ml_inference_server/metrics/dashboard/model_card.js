// What was requested and what runs.

import { byId, count, element, number, setText } from "./format.js";

export function showInfo(info) {
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

function details({ resolved, server_version, pid, instance_id, auto_choice }) {
  const own = [["Server", `${server_version} · process ${pid} · instance ${instance_id}`]];
  if (!resolved) return own;
  const versions = Object.entries(resolved.versions ?? {}).map(([name, version]) => `${name} ${version}`).join(" · ");
  const parity = resolved.parity_mean ?? null;
  return [
    ["Task", resolved.task],
    ["Hardware", [resolved.device_name, resolved.instruction_set].filter(Boolean).join(" · ")],
    ["Engine", resolved.execution_provider],
    ["Parity to FP32", parity === null ? "" : `mean cosine ${number(parity, 5)}, lowest ${number(resolved.parity_min, 5)}`],
    ["Chosen", auto_choice],
    ["Parallelism", `${count(resolved.concurrency, "batch", "batches")} in flight, ${count(resolved.threads, "thread", "threads")} each`],
    ["Input", `up to ${number(resolved.max_tokens)} tokens`],
    ["Output", count(resolved.dimension, "dimension", "dimensions")],
    ["Scores by", resolved.similarity],
    ["Parameters", number(resolved.parameters)],
    ["Weights", [resolved.weights_file, resolved.source].filter(Boolean).join(" · ")],
    ["SHA-256", resolved.weights_sha256 && `${resolved.weights_sha256.slice(0, 16)} …`],
    ["All files", resolved.model_sha256 && `SHA-256 ${resolved.model_sha256.slice(0, 16)} …`],
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

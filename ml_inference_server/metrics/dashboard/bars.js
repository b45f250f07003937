// Shares as lengths: the waterfall of the mean request, histograms, and lists of bars.

import { byId, children, element, number, percent, setText } from "./format.js";

// utils/stages.py has the definitions: name, label, meaning.
const STAGES = [
  ["receive", "receive", "decode, check, admit"],
  ["tokenize", "tokenise", "text to token ids"],
  ["queue", "queue", "until its first batch starts"],
  ["engine", "engine", "until its last batch ends"],
  ["scatter", "scatter", "rows back to the request"],
  ["reply", "reply", "compare, encode the answer"],
  ["other", "other", "no stage accounts for it"],
];

export function showWaterfall(stages) {
  const note = byId("waterfall-note");
  if (!stages) {
    byId("waterfall").replaceChildren();
    setText(note, "no request was answered in the window");
    return;
  }
  let before = 0;
  const rows = STAGES.filter(([name]) => name !== "other" || stages.other > 0.005 * stages.total).map(([name, label, what]) => {
    const [begin, share] = [before, stages.total ? stages[name] / stages.total : 0];
    before += share;
    return { name, label, what, begin, share, ms: stages[name] };
  });
  children(byId("waterfall"), rows, makeStage, fillStage);
  const longest = rows.reduce((most, row) => (row.ms > most.ms ? row : most));
  setText(note, `${number(stages.total)} ms in all; most of it, ${percent(longest.share, 0)} %, in ${longest.label} (${longest.what})`);
}

function makeStage() {
  const row = element("tr");
  const head = element("th");
  head.scope = "row";
  head.append(element("span", undefined, "name"), element("span", undefined, "what"));
  const track = element("td", undefined, "wide");
  track.append(element("span", undefined, "stage"));
  row.append(head, track, element("td", undefined, "number"), element("td", undefined, "number"));
  return row;
}

function fillStage(row, { name, label, what, begin, share, ms }) {
  const [head, track, time, part] = row.children;
  setText(head.children[0], label);
  setText(head.children[1], what);
  const bar = track.children[0];
  bar.dataset.stage = name;
  bar.style.marginInlineStart = `${(100 * begin).toFixed(2)}%`;
  bar.style.inlineSize = `${(100 * share).toFixed(2)}%`;
  setText(time, number(ms, ms >= 100 ? 0 : ms >= 10 ? 1 : ms >= 0.1 ? 2 : 3));
  setText(part, percent(share, share < 0.1 ? 1 : 0));
}

// Columns between the bounds of a distribution; the empty ones at both ends are left out.
export function showHistogram(list, { le, counts }, unit) {
  const filled = counts.flatMap((amount, index) => (amount ? [index] : []));
  const total = counts.reduce((sum, amount) => sum + amount, 0);
  const most = Math.max(...counts);
  const columns = [];
  for (let index = filled[0] ?? 0; index <= (filled.at(-1) ?? -1); index += 1) {
    const below = le[index - 1] ?? 0;
    const range = le[index] === null ? `over ${number(below)}` : below + 1 === le[index] || !index ? `${le[index]}` : `${below + 1}–${le[index]}`;
    columns.push({ range, short: le[index] === null ? "∞" : `${le[index]}`, amount: counts[index], height: counts[index] / most, share: counts[index] / total });
  }
  children(list, columns, makeColumn, (column, { range, short, amount, height, share }) => {
    column.children[0].style.blockSize = `${(100 * height).toFixed(1)}%`;
    setText(column.children[1], short);
    const sentence = `${range} ${unit}: ${number(amount)} (${percent(share, 0)} %)`;
    setText(column.children[2], sentence);
    column.title = sentence;
  });
}

function makeColumn() {
  const column = element("li");
  const label = element("span", undefined, "tick");
  label.setAttribute("aria-hidden", "true");
  column.append(element("span", undefined, "column"), label, element("span", undefined, "unseen"));
  return column;
}

// [[label, amount]] as bars, the longest first; nothing for those that are 0.
export function showBars(list, entries, { asShare = false } = {}) {
  const filled = entries.filter(([, amount]) => amount).sort(([, a], [, b]) => b - a);
  const total = filled.reduce((sum, [, amount]) => sum + amount, 0);
  const most = Math.max(...filled.map(([, amount]) => amount));
  children(list, filled, makeBar, (bar, [label, amount]) => {
    setText(bar.children[0], label);
    setText(bar.children[1], asShare ? share(amount / total) : number(amount));
    bar.children[2].children[0].style.inlineSize = `${((100 * amount) / most).toFixed(1)}%`;
  });
  return total;
}

const share = (part) => (part < 0.005 ? "< 1 %" : `${percent(part, 0)} %`);

function makeBar() {
  const bar = element("li");
  const track = element("span", undefined, "track");
  track.append(element("span", undefined, "bar"));
  bar.append(element("span", undefined, "label"), element("b"), track);
  return bar;
}

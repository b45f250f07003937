// Time series: one <svg> each, zero at the bottom, the newest at the right edge; a pointer or the arrow keys read a point.

import { children, compact, element, number, setText } from "./format.js";

const SVG = "http://www.w3.org/2000/svg";
const LEFT = 44;
const BOTTOM = 18;
const TOP = 8;
const LEAST_SPAN_S = 60;
const CLOCK = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });

const svg = (name, className) => {
  const made = document.createElementNS(SVG, name);
  if (className) made.setAttribute("class", className);
  return made;
};

// The next number of the form 1, 2, 2.5 or 5 times a power of ten.
function niceCeiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}

export class Chart {
  // series: [{ column, label, scale }]; unit: behind the values; least: the axis reaches at least so far.
  constructor(parent, { title, series, unit, digits, least = 0 }) {
    this.series = series;
    this.unit = unit;
    this.digits = digits;
    this.least = least;
    this.title = title;
    this.cursor = null;
    this.card = parent.appendChild(element("article", undefined, "card chart"));
    this.card.append(element("h3", title));
    this.legend = this.card.appendChild(element("ul", undefined, "legend"));
    this.frame = this.card.appendChild(element("div", undefined, "frame"));
    this.frame.tabIndex = 0;
    this.frame.setAttribute("role", "img");
    this.image = this.frame.appendChild(svg("svg"));
    this.image.setAttribute("aria-hidden", "true");
    this.grid = [0, 1, 2].map(() => this.image.appendChild(svg("line", "gridline")));
    this.marks = [0, 1, 2].map(() => this.image.appendChild(svg("text", "mark")));
    this.times = [0, 1].map(() => this.image.appendChild(svg("text", "mark")));
    this.area = series.length === 1 ? this.image.appendChild(svg("path", "area")) : null;
    this.lines = series.map((_, index) => this.image.appendChild(svg("path", `line k${index}`)));
    this.hair = this.image.appendChild(svg("line", "hair"));
    this.listen();
  }

  listen() {
    this.frame.addEventListener("pointermove", (event) => {
      const box = this.image.getBoundingClientRect();
      const share = (event.clientX - box.left - LEFT) / Math.max(1, box.width - LEFT);
      this.moveTo(this.rows.length ? this.indexAt(this.start + share * this.span) : null);
    });
    this.frame.addEventListener("pointerleave", () => this.moveTo(null));
    this.frame.addEventListener("blur", () => this.moveTo(null));
    this.frame.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step || !this.rows.length) return;
      event.preventDefault();
      const last = this.rows.length - 1;
      this.moveTo(Math.min(last, Math.max(0, (this.cursor ?? last) + step)));
    });
  }

  indexAt(time) {
    let best = 0;
    this.rows.forEach((row, index) => {
      if (Math.abs(row[0] - time) < Math.abs(this.rows[best][0] - time)) best = index;
    });
    return best;
  }

  moveTo(index) {
    this.cursor = index;
    this.draw(this.rows, this.columns, this.longest, this.step);
  }

  // rows: of the history, in the order of `columns`; longest: seconds that the width shows at most (a young server's
  // few rows are not lost in it); step: seconds between rows.
  draw(rows, columns, longest, step) {
    const span = rows.length ? Math.min(longest, Math.max(LEAST_SPAN_S, rows[rows.length - 1][0] - rows[0][0])) : longest;
    Object.assign(this, { rows, columns, longest, span, step });
    const { clientWidth: width, clientHeight: height } = this.frame;
    if (!width) return;
    this.image.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const at = this.series.map(({ column }) => columns.indexOf(column));
    const values = at.map((place, index) => rows.map((row) => scaled(row[place], this.series[index].scale)));
    const known = values.flat().filter((value) => value !== null);
    const ceiling = niceCeiling(Math.max(this.least, ...known));
    const end = rows.length ? rows[rows.length - 1][0] : 0;
    this.start = end - span;
    const x = (time) => LEFT + ((width - LEFT) * (time - this.start)) / span;
    const y = (value) => height - BOTTOM - ((height - BOTTOM - TOP) * value) / ceiling;
    this.drawAxes(width, height, ceiling, y, end);
    values.forEach((series, index) => {
      const runs = stretches(rows, series, step, x, y);
      this.lines[index].setAttribute("d", runs.map(drawn).join(""));
      this.area?.setAttribute("d", runs.map((run) => closed(run, y(0))).join(""));
    });
    const shown = this.cursor === null || !rows.length ? rows.length - 1 : Math.min(this.cursor, rows.length - 1);
    this.hair.toggleAttribute("hidden", this.cursor === null || shown < 0);
    if (shown >= 0) line(this.hair, x(rows[shown][0]), TOP, x(rows[shown][0]), height - BOTTOM);
    this.describe(values, shown);
  }

  drawAxes(width, height, ceiling, y, end) {
    [0, ceiling / 2, ceiling].forEach((value, index) => {
      line(this.grid[index], LEFT, y(value), width, y(value));
      place(this.marks[index], LEFT - 6, y(value) + 4, compact(value), "end");
    });
    const clock = (time) => (end ? CLOCK.format(new Date(time * 1000)) : "");
    place(this.times[0], LEFT, height - 3, clock(this.start), "start");
    place(this.times[1], width, height - 3, clock(end), "end");
  }

  describe(values, shown) {
    const texts = values.map((series) => number(series[shown] ?? null, this.digits));
    const present = this.series.map((_, index) => index).filter((index) => !index || values[index].some((value) => value !== null));
    children(
      this.legend,
      present.map((index) => [this.series[index].label, texts[index], index]),
      ([, , index]) => {
        const item = element("li");
        item.append(element("i", undefined, `key k${index}`), element("span"), element("b"));
        return item;
      },
      (item, [label, value]) => {
        setText(item.children[1], label);
        setText(item.children[2], `${value} ${this.unit}`);
      },
    );
    const when = this.cursor === null || shown < 0 ? "now" : CLOCK.format(new Date(this.rows[shown][0] * 1000));
    const spoken = present.map((index) => `${this.series[index].label} ${texts[index]} ${this.unit}`).join(", ");
    this.frame.setAttribute("aria-label", `${this.title}, ${when}: ${spoken}. Arrow keys read single points.`);
  }
}

const scaled = (value, scale = 1) => (value === null || value === undefined ? null : value * scale);

function line(target, x1, y1, x2, y2) {
  for (const [name, value] of Object.entries({ x1, y1, x2, y2 })) target.setAttribute(name, value.toFixed(1));
}

function place(target, x, y, text, anchor) {
  target.setAttribute("x", x.toFixed(1));
  target.setAttribute("y", y.toFixed(1));
  target.setAttribute("text-anchor", anchor);
  setText(target, text);
}

// The points of each unbroken stretch, as "x y". A value that is missing, or seconds without a row, break it.
function stretches(rows, values, step, x, y) {
  const runs = [];
  let run = [];
  let before = -Infinity;
  rows.forEach(([time], index) => {
    if (run.length && (values[index] === null || time - before > 3 * step)) {
      runs.push(run);
      run = [];
    }
    before = time;
    if (values[index] !== null && x(time) >= LEFT) run.push(`${x(time).toFixed(1)} ${y(values[index]).toFixed(1)}`);
  });
  if (run.length) runs.push(run);
  return runs;
}

// A point by itself is a line to itself, which round ends turn into a dot.
const drawn = (run) => `M${run.join("L")}${run.length === 1 ? `L${run[0]}` : ""}`;

function closed(run, floor) {
  const [first, last] = [run[0], run[run.length - 1]].map((point) => point.split(" ")[0]);
  return `M${first} ${floor.toFixed(1)}L${run.join("L")}L${last} ${floor.toFixed(1)}Z`;
}

// Sparklines: one <svg>, one or more series of numbers (null is a gap), the newest at the right edge, zero at the bottom.

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 240;
const HEIGHT = 40;
const TOP = 2;

export const HISTORY = 120;

export class Sparkline {
  constructor(svg, fields) {
    this.fields = fields;
    this.series = fields.map(() => []);
    svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    svg.setAttribute("preserveAspectRatio", "none");
    this.areas = fields.length === 1 ? [svg.appendChild(path("area"))] : [];
    this.lines = fields.map((_, index) => svg.appendChild(path(`line k${index}`)));
  }

  // The highest value that is drawn; null when nothing is.
  get peak() {
    const values = this.series.flat().filter((value) => value !== null);
    return values.length ? Math.max(...values) : null;
  }

  push(values) {
    this.series.forEach((series, index) => {
      series.push(values[index] ?? null);
      if (series.length > HISTORY) series.shift();
    });
    const peak = this.peak ?? 0;
    this.series.forEach((series, index) => {
      const runs = stretches(series, peak);
      this.lines[index].setAttribute("d", runs.map((run) => `M${run.join("L")}`).join(""));
      this.areas[index]?.setAttribute("d", runs.map(closed).join(""));
    });
  }
}

function path(className) {
  const element = document.createElementNS(SVG, "path");
  element.setAttribute("class", className);
  element.setAttribute("vector-effect", "non-scaling-stroke");
  return element;
}

// The points of each unbroken stretch, as "x y".
function stretches(series, peak) {
  const runs = [];
  let run = [];
  series.forEach((value, index) => {
    if (value === null) {
      if (run.length) runs.push(run);
      run = [];
      return;
    }
    const x = WIDTH - ((series.length - 1 - index) * WIDTH) / (HISTORY - 1);
    const y = peak > 0 ? HEIGHT - 1 - ((HEIGHT - 1 - TOP) * value) / peak : HEIGHT - 1;
    run.push(`${x.toFixed(1)} ${y.toFixed(1)}`);
  });
  if (run.length) runs.push(run);
  return runs;
}

function closed(run) {
  const first = run[0].split(" ")[0];
  const last = run[run.length - 1].split(" ")[0];
  return `M${first} ${HEIGHT}L${run.join("L")}L${last} ${HEIGHT}Z`;
}

// The two charts, as SVG: power over time, and how many queries cost how much. Knows nothing of polling.

import { $, el, figure, show, table } from "./page.js";

export const IDLE = "idle";
const LATE = 2; // moments, five seconds apart

// Tasks keep their hue as long as the page is open.
const hues = new Map();
export const hue = (task) => {
  if (!hues.has(task)) hues.set(task, `k${hues.size % 8}`);
  return hues.get(task);
};
export const swatch = (kind) => el("svg:svg", { viewBox: "0 0 10 10", "aria-hidden": "true" },
  el("svg:rect", { width: 10, height: 10, rx: 2, class: kind }));

// --- Power ---

/** Power between neighbouring moments, in watts: of each task, of idling, of everything else, and by the meter.
 *
 * What no request took is booked ten seconds later, so the last moments only serve those before them. */
export function powers(moments) {
  return moments.slice(1, -LATE).map((now, i) => {
    const then = moments[i];
    const watts = (later, earlier, of) => Math.max(0, (of(later) - of(earlier)) / seconds(earlier, later));
    const byTask = ([task]) => [task, watts(now, then, (each) => each.tasks[task] ?? 0)];
    const unattributed = (reason) => watts(moments[i + 1 + LATE], moments[i + LATE], (each) => each.unattributed[reason] ?? 0);
    const others = Object.keys(now.unattributed).filter((reason) => reason !== IDLE);
    return {
      at: Date.parse(now.at),
      tasks: Object.fromEntries(Object.entries(now.tasks).map(byTask)),
      idle: unattributed(IDLE),
      rest: others.reduce((sum, reason) => sum + unattributed(reason), 0),
      metered: watts(now, then, (each) => each.metered_j),
    };
  });
}

export const seconds = (earlier, later) => (Date.parse(later.at) - Date.parse(earlier.at)) / 1000;

/** A round number at or above the value, for the top of an axis. */
function ceiling(value) {
  const power = 10 ** Math.floor(Math.log10(value || 1));
  return [1, 2, 5, 10].map((step) => step * power).find((top) => top >= value);
}

/** Width of a chart in its own units, which are about pixels, so that its letters keep their size on a phone. */
const widthOf = (parent) => Math.max(300, Math.round(parent.clientWidth || 850));

export function drawPower(series) {
  const parent = $("power");
  const layers = [...hues.keys()].map((task) => ({ kind: hue(task), name: task, of: (each) => each.tasks[task] ?? 0 }));
  layers.push({ kind: "krest", name: "overhead and others", of: (each) => each.rest });
  layers.push({ kind: "kidle", name: IDLE, of: (each) => each.idle });
  show($("power-legend"), ...layers.map(({ kind, name }) => el("span", {}, swatch(kind), name)));
  if (series.length < 2) {
    show(parent, el("p", { class: "dim" }, "The first points appear after half a minute."));
    return;
  }
  const [width, height, left, bottom] = [widthOf(parent), 220, 44, 22];
  const total = (each) => layers.reduce((sum, layer) => sum + layer.of(each), 0);
  const top = ceiling(Math.max(...series.map(total), 0.001));
  const [from, to] = [series[0].at, series.at(-1).at];
  const x = (at) => left + ((at - from) / (to - from)) * (width - left);
  const y = (watts) => (1 - watts / top) * (height - bottom - 8) + 8;
  const drawing = el("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": describePower(series) });
  for (const share of [0, 0.5, 1]) {
    drawing.append(el("svg:line", { x1: left, x2: width, y1: y(top * share), y2: y(top * share), class: "grid" }));
    drawing.append(el("svg:text", { x: left - 6, y: y(top * share) + 4, "text-anchor": "end" }, figure(top * share, "W")));
  }
  const floor = series.map(() => 0);
  for (const layer of layers) {
    const lower = series.map((each, i) => `${x(each.at).toFixed(1)},${y(floor[i]).toFixed(1)}`);
    series.forEach((each, i) => { floor[i] += layer.of(each); });
    const upper = series.map((each, i) => `${x(each.at).toFixed(1)},${y(floor[i]).toFixed(1)}`);
    drawing.append(el("svg:polygon", { points: [...upper, ...lower.reverse()].join(" "), class: `area ${layer.kind}` },
      el("svg:title", {}, layer.name)));
  }
  const time = (at) => new Date(at).toLocaleTimeString();
  drawing.append(el("svg:text", { x: left, y: height - 4 }, time(from)));
  drawing.append(el("svg:text", { x: width, y: height - 4, "text-anchor": "end" }, time(to)));
  show(parent, drawing);
}

function describePower(series) {
  const last = series.at(-1);
  const parts = Object.entries(last.tasks).filter(([, watts]) => watts > 0);
  const tasks = parts.map(([task, watts]) => `${task} ${figure(watts, "W")}`).join(", ") || "no request";
  return `Stacked areas of power by task. Last: ${tasks}, idle ${figure(last.idle, "W")}.`;
}

export function tablePower(series) {
  const tasks = [...hues.keys()];
  const rows = series.slice(-12).reverse().map((each) => [
    new Date(each.at).toLocaleTimeString(),
    ...[...tasks.map((task) => each.tasks[task] ?? 0), each.rest, each.idle, each.metered].map((watts) => figure(watts, "W")),
  ]);
  show($("power-table"), table(["Until", ...tasks.map((task) => `${task} `), "others ", "idle ", "meter "], rows));
}

// --- Joules per query ---

/** The class in which the given share of requests is reached, as its upper end; null without requests. */
export function quantile(counts, bounds, share) {
  const rank = share * counts.reduce((sum, each) => sum + each, 0);
  let seen = 0;
  for (let i = 0; i < counts.length; i += 1) {
    seen += counts[i];
    if (seen > 0 && seen >= rank) return i < bounds.length ? `≤ ${figure(bounds[i], "J")}` : `> ${figure(bounds.at(-1), "J")}`;
  }
  return "unknown";
}

export function drawSpread(live) {
  const picked = $("spread-task").value;
  const tasks = picked ? [picked] : Object.keys(live.tasks);
  const counts = live.bounds_j.concat(0).map((_, i) => tasks.map((task) => live.tasks[task]?.counts[i] ?? 0));
  const sums = counts.map((each) => each.reduce((sum, count) => sum + count, 0));
  const filled = sums.flatMap((sum, i) => (sum ? [i] : []));
  if (!filled.length) {
    show($("spread"), el("p", { class: "dim" }, "No query with a known bill yet."));
    return;
  }
  // A class more on either side, so that a single bar does not fill the width.
  const first = Math.max(0, filled[0] - 1);
  const last = Math.min(sums.length - 1, filled.at(-1) + 1);
  const [width, height, left, bottom] = [widthOf($("spread")), 180, 44, 22];
  const top = Math.max(...sums);
  const step = (width - left) / (last - first + 1);
  const y = (count) => (1 - count / top) * (height - bottom - 8) + 8;
  const all = sums.reduce((sum, each) => sum + each, 0);
  const median = quantile(sums, live.bounds_j, 0.5);
  const label = `Bars of how many queries cost how many joules: ${all} queries, half of them ${median}.`;
  const drawing = el("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  for (const count of top > 1 ? [0, top] : [0, 1]) {
    drawing.append(el("svg:line", { x1: left, x2: width, y1: y(count), y2: y(count), class: "grid" }));
    drawing.append(el("svg:text", { x: left - 6, y: y(count) + 4, "text-anchor": "end" }, count));
  }
  const bound = (i) => (i < live.bounds_j.length ? figure(live.bounds_j[i], "J") : "more");
  const every = Math.ceil(64 / step);
  for (let i = first; i <= last; i += 1) {
    let stacked = 0;
    tasks.forEach((task, n) => {
      const count = counts[i][n];
      if (!count) return;
      drawing.append(el("svg:rect", {
        x: left + (i - first) * step + 1, width: Math.max(1, step - 2),
        y: y(stacked + count), height: y(stacked) - y(stacked + count), class: hue(task),
      }, el("svg:title", {}, `${task}: ${count} up to ${bound(i)}`)));
      stacked += count;
    });
    if ((last - i) % every === 0) {
      drawing.append(el("svg:text", { x: left + (i - first + 1) * step - 2, y: height - 4, "text-anchor": "end" }, bound(i)));
    }
  }
  show($("spread"), drawing);
}

// Polls the live figures and shows them: tiles, charts, tables, and in words how far to trust them.

import { IDLE, drawPower, drawSpread, hue, powers, quantile, seconds, swatch, tablePower } from "./charts.js";
import { $, el, figure, percent, show, table, tiles } from "./page.js";

const INTERVAL_MS = 2000;
const FEW = 10;
/** By the best quality that a bill can have here. */
const QUALITY = {
  measured: "Joules come from hardware counters: measured where a request's steps are longer than the time between two readings, apportioned where they are shorter. Each bill says which.",
  apportioned: "Joules come from hardware counters, shared among requests that are shorter than the time between two readings.",
  estimated: "Joules are estimated, by a power model on CPU time or from the power readings of a GPU: not all that runs here has an energy counter that can be read.",
  unavailable: "No joules are known here: there is neither a counter nor a power model. Bills say null, which is not zero.",
};
const SOURCE = { nvml: "NVIDIA's counter (NVML)", powercap: "the processor's counter (RAPL)", estimate: "a power model" };

function tableTasks(live) {
  const rows = Object.entries(live.tasks).sort().map(([task, sums]) => {
    const known = sums.requests - sums.unknown;
    return [
      el("span", { class: "legend" }, el("span", {}, swatch(hue(task)), task)),
      sums.requests,
      figure(known ? sums.allocated_j / known : null, "J"),
      quantile(sums.counts, live.bounds_j, 0.5),
      quantile(sums.counts, live.bounds_j, 0.95),
      figure(known ? sums.gco2e : null, "g"),
    ];
  });
  show($("tasks"), rows.length
    ? table(["Task", "Queries ", "Mean ", "Half of them ", "95 % of them ", "CO2e "], rows)
    : el("p", { class: "dim" }, "No query yet: the playground below makes one."));
}

// --- Tiles, words and bills ---

function showTiles(live) {
  const moments = live.moments ?? [];
  const [before, now] = [moments.at(-4) ?? moments[0], moments.at(-1)];
  const watts = now && now !== before ? (now.metered_j - before.metered_j) / seconds(before, now) : null;
  const known = live.quality !== "unavailable";
  const sums = Object.values(live.tasks);
  const requests = sums.reduce((sum, each) => sum + each.requests, 0);
  const billed = sums.reduce((sum, each) => sum + each.requests - each.unknown, 0);
  const joules = sums.reduce((sum, each) => sum + each.allocated_j, 0);
  const grams = sums.reduce((sum, each) => sum + each.gco2e, 0);
  const first = moments[0];
  const grown = (of) => (now ? of(now) - of(first) : 0);
  const total = (parts) => Object.values(parts).reduce((sum, each) => sum + each, 0);
  const booked = grown((moment) => total(moment.tasks) + total(moment.unattributed));
  const idled = grown((moment) => moment.unattributed[IDLE] ?? 0);
  const grid = live.grid_zone ? `grid: ${live.grid_zone}` : "no bill yet";
  const power = [
    ["Power now", figure(known ? watts : null, "W"), "last 15 s, metered"],
    ["Idle share", booked > 0 ? percent(idled / booked) : "unknown", "of the last ten minutes"],
  ];
  const figures = [
    ...(live.moments ? power : []),
    ["Queries", requests.toLocaleString(), `since ${new Date(live.began_at).toLocaleString()}`],
    ["Mean per query", figure(billed ? joules / billed : null, "J"), "allocated, idle included"],
    ["CO2e", figure(billed ? grams : null, "g"), grid],
  ];
  if (live.budget) {
    const hours = (live.budget.resets_in_s / 3600).toFixed(1);
    const share = percent(live.budget.spent_j / live.budget.limit_j);
    figures.push(["Today's budget", share, `${figure(live.budget.spent_j, "J")} of ${figure(live.budget.limit_j, "J")}; new in ${hours} h`]);
  }
  show($("tiles"), ...tiles(figures));
  const read = [...new Set(live.meters.map((meter) => `${meter.device} from ${SOURCE[meter.source] ?? meter.source}`))];
  $("meter").textContent = QUALITY[live.quality] + (read.length ? ` Read: ${read.join(", ")}.` : "");
}

function showBills(live) {
  const all = $("all-bills").getAttribute("aria-expanded") === "true";
  $("all-bills").hidden = live.recent.length <= FEW;
  const rows = live.recent.slice(0, all ? undefined : FEW).map((bill) => [
    new Date(bill.finished_at).toLocaleTimeString(),
    bill.task,
    figure(bill.energy.allocated_j, "J"),
    figure(bill.energy.gco2e, "g"),
    bill.status,
    `${bill.usage.input_tokens} + ${bill.usage.output_tokens}`,
    bill.energy.quality,
    el("a", { href: `v1/energy/requests/${encodeURIComponent(bill.id)}` }, bill.id.slice(0, 12)),
  ]);
  show($("recent"), rows.length
    ? table(["Over at", "Task", "Energy ", "CO2e ", "End", "Tokens ", "Quality", "Bill"], rows)
    : el("p", { class: "dim" }, "No request is over yet."));
}

// --- Polling ---

let latest = null;

function draw() {
  if (!latest) return;
  for (const task of Object.keys(latest.tasks).sort()) {
    hue(task);
    const options = [...$("spread-task").options].map((option) => option.value);
    if (!options.includes(task)) $("spread-task").append(el("option", { value: task }, task));
  }
  $("power-part").hidden = !latest.moments;
  const series = powers(latest.moments ?? []);
  showTiles(latest);
  drawPower(series);
  if ($("power-table").parentElement.open) tablePower(series);
  drawSpread(latest);
  tableTasks(latest);
  showBills(latest);
}

async function poll() {
  try {
    const response = await fetch("v1/energy/live");
    if (!response.ok) throw new Error(`status ${response.status}`);
    latest = await response.json();
    draw();
    say("Live: the figures follow every two seconds.");
  } catch (error) {
    say(`The figures stand still: the service cannot be reached (${error.message}). Trying again.`, "error");
  }
}

/** A screen reader speaks a change of state, not every poll. */
function say(text, kind = "dim") {
  if ($("state").textContent !== text) $("state").textContent = text;
  $("state").className = kind;
}

async function watch() {
  for (;;) {
    if (!document.hidden) await poll();
    await new Promise((done) => setTimeout(done, INTERVAL_MS));
  }
}

$("all-bills").addEventListener("click", ({ currentTarget: button }) => {
  const more = button.getAttribute("aria-expanded") === "false";
  button.setAttribute("aria-expanded", more);
  button.textContent = more ? "Show fewer" : "Show more";
  draw();
});
$("spread-task").addEventListener("change", draw);
$("power-table").parentElement.addEventListener("toggle", draw);
window.addEventListener("resize", draw);
document.addEventListener("answered", poll);
watch();

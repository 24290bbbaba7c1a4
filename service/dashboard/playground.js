// Asks the service what the reader types. The fields follow from the OpenAPI document, so a new task needs nothing here.

import { $, el, figure, percent, tiles } from "./page.js";

const tasks = new Map();
let openapi = null;

const resolve = (schema) => (schema?.$ref ? openapi.components.schemas[schema.$ref.split("/").at(-1)] : schema ?? {});

async function loadTasks() {
  openapi = await (await fetch("openapi.json")).json();
  for (const [path, { post }] of Object.entries(openapi.paths)) {
    const body = post?.requestBody?.content?.["application/json"];
    if (post?.tags?.includes("tasks") && body?.example) {
      tasks.set(post.operationId, { path: path.slice(1), summary: post.summary, schema: resolve(body.schema), example: body.example });
    }
  }
  $("choices").append(...[...tasks.keys()].map((name, i) => {
    const input = el("input", { type: "radio", name: "task", value: name });
    input.checked = i === 0;
    input.addEventListener("change", () => chooseTask(name));
    return el("label", {}, input, name);
  }));
  const [first] = tasks.keys();
  if (first) chooseTask(first);
}

function chooseTask(name) {
  const { schema, example } = tasks.get(name);
  const required = new Set(schema.required ?? []);
  const entries = Object.entries(schema.properties);
  const made = (keep) => entries.filter(([key]) => keep(key)).map(([key, part]) => field(key, part, example[key], required.has(key)));
  $("fields").replaceChildren(...made((key) => required.has(key)));
  $("more").replaceChildren(...made((key) => !required.has(key)));
  $("answer").replaceChildren();
}

/** One parameter as a labelled control that knows how to read its own value. */
function field(key, schema, example, required) {
  const kinds = [schema, ...(schema.anyOf ?? [])].map(resolve);
  const kind = (type) => kinds.find((each) => each.type === type);
  const number = kind("integer") ?? kind("number");
  const choices = kinds.find((each) => each.enum)?.enum;
  const id = `field-${key}`;
  const notes = schema.description ? [el("p", { class: "dim", id: `${id}-note` }, ...code(schema.description))] : [];
  const about = notes.length ? { id, name: key, "aria-describedby": `${id}-note` } : { id, name: key };
  let control;
  if (choices) {
    control = el("select", about, ...choices.map((value) => el("option", { value }, value)));
    control.value = example ?? schema.default;
    control.read = () => control.value;
  } else if (kind("boolean")) {
    control = el("input", { ...about, type: "checkbox" });
    control.checked = example ?? schema.default ?? false;
    control.read = () => control.checked;
    return el("div", { class: "field" }, el("div", { class: "check" }, control, el("label", { for: id }, key)), ...notes);
  } else if (number) {
    control = el("input", { ...about, type: "number", step: number.type === "integer" ? 1 : "any", min: number.minimum, max: number.maximum });
    control.value = example ?? "";
    control.read = () => (control.value === "" ? undefined : Number(control.value));
  } else {
    const lines = [example ?? ""].flat();
    control = el(required ? "textarea" : "input", required ? { ...about, rows: 4 } : { ...about, type: "text" });
    control.value = required ? lines.join("\n") : "";
    // Where the example is a list, every line is a text of its own.
    const many = Array.isArray(example) && required;
    if (many) notes.unshift(el("p", { class: "dim" }, "One text per line."));
    control.read = () => (many ? control.value.split("\n").filter((line) => line.trim()) : control.value || (required ? "" : undefined));
  }
  return el("div", { class: "field" }, el("label", { for: id }, key), ...notes, control);
}

/** Text in which what stands in backticks is code. */
const code = (text) => text.split("`").map((part, i) => (i % 2 ? el("code", {}, part) : part));

function body() {
  const read = {};
  for (const control of $("form").elements) {
    const value = control.read?.();
    if (value !== undefined) read[control.name] = value;
  }
  return read;
}

async function ask(path, content) {
  const buttons = $("form").querySelectorAll("button");
  buttons.forEach((button) => { button.disabled = true; });
  $("answer").replaceChildren(el("p", { class: "dim" }, "Working."));
  try {
    const response = await fetch(path, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(content),
    });
    const answer = await response.json();
    if (response.ok) return answer;
    $("answer").replaceChildren(el("p", { class: "error" }, answer.error?.message ?? `status ${response.status}`));
  } catch (error) {
    $("answer").replaceChildren(el("p", { class: "error" }, `No answer: ${error.message}. Is the service still running?`));
  } finally {
    buttons.forEach((button) => { button.disabled = false; });
  }
  return null;
}

const chosen = () => tasks.get($("form").elements.task.value);

/** A task's result in a few words, whatever the task: what it says first, the rest below. */
function result(each) {
  const [[, main], ...rest] = Object.entries(each);
  const shown = (value) => (typeof value === "number" && !Number.isInteger(value) ? value.toPrecision(3) : value);
  const text = (value) => (value !== null && typeof value === "object" ? Object.entries(value).map(([name, part]) => `${name} ${shown(part)}`).join(", ") : shown(value));
  return el("div", { class: "result" }, el("b", {}, main === "" ? "(nothing)" : main),
    ...rest.filter(([, value]) => value !== null).map(([name, value]) => el("div", { class: "dim" }, `${name}: ${text(value)}`)));
}

const bill = (figures) => el("dl", { class: "tiles" }, ...tiles(figures));

async function run(event) {
  event.preventDefault();
  const answer = await ask(chosen().path, body());
  if (!answer) return;
  const { energy, usage, timings } = answer;
  $("answer").replaceChildren(
    el("h3", {}, answer.results.length > 1 ? "Answers" : "Answer"),
    ...answer.results.map(result),
    el("h3", {}, "Bill"),
    bill([
      ["Allocated", figure(energy.allocated_j, "J"), `${figure(energy.active_j, "J")} above idle`],
      ["CO2e", figure(energy.gco2e, "g"), energy.settled ? "final" : "not final yet"],
      ["Quality", energy.quality, answer.model],
      ["Tokens", `${usage.input_tokens} + ${usage.output_tokens}`, "read + written"],
      ["Time", figure((timings.queue_ms + timings.compute_ms) / 1000, "s"), `${figure(timings.queue_ms / 1000, "s")} in the queue`],
    ]),
    el("details", {}, el("summary", {}, "The whole answer"), el("pre", {}, JSON.stringify(answer, null, 2))));
  document.dispatchEvent(new Event("answered"));
}

async function estimate() {
  const answer = await ask("v1/energy/estimate", { task: $("form").elements.task.value, ...body() });
  if (!answer) return;
  const { energy, usage, error } = answer;
  const range = energy.low_j === null ? "no interval yet" : `usually ${figure(energy.low_j, "J")} to ${figure(energy.high_j, "J")}`;
  $("answer").replaceChildren(
    el("h3", {}, "Estimate"),
    energy.allocated_j === null
      ? el("p", {}, "Nothing like it has been billed yet, so nothing is known. Run it once.")
      : bill([
        ["Allocated", figure(energy.allocated_j, "J"), range],
        ["CO2e", figure(energy.gco2e, "g"), "of it"],
        ["Tokens", `${usage.input_tokens} + ${usage.output_tokens}`, "read + expected"],
        ["Usual error", error.median_relative === null ? "unknown" : percent(error.median_relative), `over ${error.requests} requests`],
      ]));
}

$("form").addEventListener("submit", run);
$("estimate").addEventListener("click", estimate);
loadTasks().catch((error) => $("answer").replaceChildren(el("p", { class: "error" }, `The tasks cannot be read: ${error.message}`)));

// Draws /openapi.json: a group for each dialect, its routes, their fields, and a form that sends an example.

import { KeyNeeded, ask, checkAnswer, headers } from "./key.js";

const MOST_SHOWN = 4000;

function made(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

function resolved(api, schema) {
  const name = schema?.$ref?.split("/").pop();
  return name ? api.components.schemas[name] : schema;
}

function typeOf(api, field) {
  const schema = resolved(api, field);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(", ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.anyOf) return [...new Set(schema.anyOf.map((each) => typeOf(api, each)))].join(" or ");
  if (schema.type === "array") return `list of ${schema.items ? typeOf(api, schema.items) : "anything"}`;
  return schema.type ?? "anything";
}

function fieldTable(api, schema) {
  const table = made("table");
  const head = table.createTHead().insertRow();
  for (const name of ["Field", "Type", "Default", "Meaning"]) {
    const cell = made("th", name);
    cell.scope = "col";
    head.append(cell);
  }
  const body = table.createTBody();
  for (const [name, field] of Object.entries(schema.properties ?? {})) {
    const row = body.insertRow();
    row.insertCell().append(made("code", name));
    row.insertCell().textContent = typeOf(api, field);
    const needed = schema.required?.includes(name);
    row.insertCell().textContent = needed ? "required" : JSON.stringify(field.default ?? null);
    row.insertCell().textContent = field.description ?? "";
  }
  return table;
}

async function send(path, text, shown, status) {
  status.textContent = "sending …";
  const began = performance.now();
  try {
    const response = await fetch(path.slice(1) || "./", {
      method: "POST",
      headers: headers({ "Content-Type": "application/json" }),
      body: text,
    });
    checkAnswer(response);
    const answer = await response.text();
    status.textContent = `${response.status} after ${(performance.now() - began).toFixed(1)} ms, ${answer.length} characters`;
    shown.textContent = answer.length > MOST_SHOWN ? `${answer.slice(0, MOST_SHOWN)} …` : answer;
  } catch (error) {
    if (error instanceof KeyNeeded) {
      status.textContent = error.message;
      await ask(error.message);
      await send(path, text, shown, status);
      return;
    }
    status.textContent = "no answer: the server is not there";
  }
  shown.hidden = false;
}

function tryForm(path, example) {
  const form = made("div");
  form.append(made("h3", "Try it"));
  const text = made("textarea", JSON.stringify(example, null, 2));
  text.setAttribute("aria-label", `Body for ${path}`);
  text.spellcheck = false;
  const line = made("p", undefined, "send");
  const button = made("button", "Send");
  button.type = "button";
  const status = made("span", "", "note");
  status.setAttribute("role", "status");
  const shown = made("pre");
  shown.tabIndex = 0;
  shown.hidden = true;
  button.addEventListener("click", () => send(path, text.value, shown, status));
  line.append(button, status);
  form.append(text, line, shown);
  return form;
}

function routeBox(api, path, method, operation) {
  const box = made("details", undefined, "route");
  const summary = made("summary");
  summary.append(made("span", method.toUpperCase(), "method"), made("code", path), made("span", operation.summary, "what"));
  box.append(summary);
  const schema = operation.requestBody?.content["application/json"]?.schema;
  for (const each of schema?.anyOf ?? (schema ? [schema] : [])) {
    const found = resolved(api, each);
    box.append(made("h3", found.description ?? "Body"), fieldTable(api, found));
    if (found.example) box.append(tryForm(path, found.example));
  }
  return box;
}

async function draw() {
  const response = await fetch("openapi.json");
  if (!response.ok) throw new Error(`openapi.json: ${response.status}`);
  const api = await response.json();
  document.getElementById("about").textContent = api.info.description;
  const groups = new Map(api.tags.map((tag) => [tag.name, []]));
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(methods)) groups.get(operation.tags[0]).push([path, method, operation]);
  }
  const place = document.getElementById("routes");
  for (const [name, routes] of groups) {
    const section = made("section");
    section.append(made("h2", name), ...routes.map(([path, method, operation]) => routeBox(api, path, method, operation)));
    place.append(section);
  }
}

draw().catch((error) => {
  const problem = document.getElementById("problem");
  problem.textContent = `The description of the API could not be read: ${error.message}`;
  problem.hidden = false;
});

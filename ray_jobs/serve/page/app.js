// The page: choose a picture, draw a region, read what the model writes, ask on.

import { ApiError, dataUrl, key, post, stream } from "./api.js";
import { Viewer } from "./viewer.js";

const $ = (id) => document.getElementById(id);
const state = { url: null, recipe: null, image: null, running: null, retry: null };
const THUMB_PX = 52;
const viewer = new Viewer($("canvas"), refresh);

// -- pictures ---------------------------------------------------------------------------------------------------------

async function open(blob, { recipe = null, frame = null, boxes = [] } = {}) {
  state.url = await dataUrl(blob);
  state.recipe = recipe;
  $("window").replaceChildren();
  if (!(await render(frame, "", false))) return;
  if (boxes.length) viewer.setBox(boxes[0]);
}

/** Has the server draw the picture: it knows every format and window. */
async function render(frame, window, keep) {
  return guarded(async () => {
    const body = { image: state.url };
    if (frame !== null) body.frame = frame;
    if (window) body.window = window;
    const shown = await post("v1/images:render", body);
    const picture = new Image();
    picture.src = shown.png;
    await picture.decode();
    state.image = { ...shown.image, window };
    viewer.show(picture, keep);
    $("hint").hidden = true;
    controls(shown.image);
    return true;
  }, () => render(frame, window, keep));
}

function controls(image) {
  const select = $("window");
  $("window-field").hidden = !image.windows.length;
  if (!select.options.length) {
    for (const name of ["", ...image.windows]) select.add(new Option(name.replaceAll("_", " ") || "default", name));
  }
  $("frame-field").hidden = image.num_frames < 2;
  $("frame").max = image.num_frames - 1;
  $("frame").value = image.frame ?? 0;
  $("frame-number").textContent = `${(image.frame ?? 0) + 1} / ${image.num_frames}`;
  refresh();
}

// -- asking -----------------------------------------------------------------------------------------------------------

function request(more) {
  const { image, recipe, url } = state;
  const body = { model: "meddam", ...viewer.fields(), ...more };
  if (recipe) body.recipe = recipe;
  if (image.frame !== null) body.frame = image.frame;
  if (image.window) body.window = image.window;
  const content = [{ type: "image_url", image_url: { url } }];
  if (more.question) content.push({ type: "text", text: more.question });
  delete body.question;
  return { ...body, messages: [{ role: "user", content }] };
}

async function describe(asked) {
  if (!viewer.fields() || state.running) return;
  const answers = asked.map((more) => [more, card(more.question || more.prompt)]);
  const holder = document.createElement("div");
  if (answers.length > 1) holder.className = "pair";
  holder.append(...answers.map(([, made]) => made.element));
  $("answers").prepend(holder);
  holder.scrollIntoView({ block: "nearest" });
  $("empty").hidden = true;
  state.running = new AbortController();
  refresh();
  await Promise.all(answers.map(([more, made]) => fill(made, request(more), state.running.signal)));
  state.running = null;
  $("follow").hidden = false;
  refresh();
}

async function fill(made, body, signal) {
  let text = "";
  try {
    const end = await stream(body, (piece) => made.write((text += piece)), signal);
    made.finish({ caption: text, ...end });
  } catch (error) {
    made.fail(error.name === "AbortError" ? `${text} (stopped)` : error.message);
    if (error.status === 401) askForKey("That key was not accepted.", null);
  }
}

function card(title) {
  const element = document.createElement("article");
  element.className = "card busy";
  const head = document.createElement("h3");
  head.textContent = title;
  const caption = document.createElement("p");
  caption.className = "caption";
  element.append(place(), head, caption);
  return {
    element,
    write: (text) => (caption.textContent = text),
    fail: (text) => {
      element.className = "card failed";
      caption.textContent = text;
    },
    finish: (answer) => {
      element.className = "card";
      caption.textContent = answer.caption;
      if (answer.findings.length) element.append(chips(answer.findings));
      element.append(facts(answer));
    },
  };
}

/** The region that a card is about; a click shows it on the picture again. */
function place() {
  const button = Object.assign(document.createElement("button"), { type: "button", className: "place", title: "Show this region again" });
  button.setAttribute("aria-label", `Show this region again: ${$("where").textContent}`);
  const drawn = viewer.drawn();
  button.append(viewer.thumb(2 * THUMB_PX));
  button.addEventListener("click", () => {
    if (!viewer.showAgain(drawn)) show(new Error("Another picture is open now; this region was drawn on one of another size."));
  });
  return button;
}

function chips(findings) {
  const list = document.createElement("ul");
  list.className = "chips";
  for (const finding of findings) {
    const item = document.createElement("li");
    if (!finding.present) item.className = "absent";
    const size = finding.length_mm === null ? "" : `: ${finding.length_mm} mm`;
    item.textContent = (finding.present ? (finding.hedged ? "possible " : "") : "no ") + finding.name.replace(/^(an?|the) /, "") + size;
    if (finding.codes.length) {
      const code = document.createElement("code");
      code.textContent = finding.codes.map((c) => `${c.system} ${c.code}`).join(", ");
      item.title = finding.codes.map((c) => `${c.system} ${c.code}: ${c.display}`).join("\n");
      item.append(code);
    }
    list.append(item);
  }
  return list;
}

function facts(answer) {
  const line = document.createElement("div");
  line.className = "facts";
  const told = [`confidence ${Math.round(100 * answer.confidence)} %`, `${answer.usage.completion_tokens} tokens`];
  if (answer.finish_reason === "length") told.push("cut at its limit");
  for (const text of told) line.append(Object.assign(document.createElement("span"), { textContent: text }));
  line.firstChild.title = "How sure the model was of its words, not whether they are true";
  const copy = Object.assign(document.createElement("button"), { type: "button", className: "quiet", textContent: "Copy as JSON" });
  copy.addEventListener("click", async () => {
    await navigator.clipboard.writeText(JSON.stringify(answer, null, 2));
    copy.textContent = "Copied";
  });
  line.append(copy);
  return line;
}

function refresh() {
  const fields = viewer.picture && viewer.fields();
  $("describe").disabled = !fields || Boolean(state.running);
  $("stop").hidden = !state.running;
  const kind = fields && Object.keys(fields)[0];
  $("where").textContent = !fields ? "" : kind === "box" ? `box ${fields.box.join(", ")}` : kind === "polygon" ? `polygon of ${fields.polygon.length} points` : "painted mask";
}

// -- errors and the key -----------------------------------------------------------------------------------------------

let fading = 0;

function show(error) {
  $("error").textContent = error.message;
  $("error").hidden = false;
  clearTimeout(fading);
  fading = setTimeout(() => ($("error").hidden = true), 8000);
}

async function guarded(work, again) {
  try {
    return await work();
  } catch (error) {
    if (!(error instanceof ApiError)) show(new Error("This picture cannot be shown."));
    else if (error.status === 401) askForKey(key.get() ? "That key was not accepted." : "", again);
    else show(error);
    return false;
  }
}

function askForKey(text, again) {
  if (text) $("key-text").textContent = text;
  state.retry = again;
  $("key-input").value = "";
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

// -- wiring -----------------------------------------------------------------------------------------------------------

function useTool(tool) {
  viewer.use(tool);
  for (const button of document.querySelectorAll("[data-tool]")) {
    button.setAttribute("aria-pressed", String(button.dataset.tool === tool));
  }
  $("brush-field").hidden = tool !== "brush";
}

function asked() {
  const length = $("length").value;
  const prompts = [$("prompt").value, ...($("compare").checked ? [$("prompt-2").value] : [])];
  return prompts.map((prompt) => ({ prompt, ...(length && prompt.startsWith("meddam") ? { length } : {}) }));
}

for (const button of document.querySelectorAll("[data-tool]")) button.addEventListener("click", () => useTool(button.dataset.tool));
$("zoom-in").addEventListener("click", () => viewer.zoom(1.3));
$("zoom-out").addEventListener("click", () => viewer.zoom(1 / 1.3));
$("fit").addEventListener("click", () => viewer.fit());
$("clear").addEventListener("click", () => viewer.clear());
$("brush-size").addEventListener("input", (e) => (viewer.brush = Number(e.target.value)));
$("compare").addEventListener("change", (e) => ($("prompt-2").disabled = !e.target.checked));
$("window").addEventListener("change", (e) => render(state.image.frame, e.target.value, true));
$("frame").addEventListener("change", (e) => render(Number(e.target.value), $("window").value, true));
$("file").addEventListener("change", (e) => e.target.files[0] && open(e.target.files[0]).catch(show));
$("stop").addEventListener("click", () => state.running?.abort());
$("key").addEventListener("click", () => askForKey("", null));
$("key-cancel").addEventListener("click", () => $("key-dialog").close());
$("key-form").addEventListener("submit", () => {
  key.set($("key-input").value.trim());
  state.retry?.();
});
$("ask").addEventListener("submit", (e) => {
  e.preventDefault();
  viewer.closePolygon();
  describe(asked());
});
$("follow").addEventListener("submit", (e) => {
  e.preventDefault();
  const question = $("question").value.trim();
  if (!question) return;
  $("question").value = "";
  const length = $("length").value;
  describe([{ question, ...(length ? { length } : {}) }]);
});

const stage = $("stage");
for (const name of ["dragover", "dragleave", "drop"]) {
  stage.addEventListener(name, (e) => {
    e.preventDefault();
    stage.classList.toggle("over", name === "dragover");
    if (name === "drop" && e.dataTransfer.files[0]) open(e.dataTransfer.files[0]).catch(show);
  });
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const TOOLS = { b: "box", p: "polygon", m: "brush", h: "pan" };

document.addEventListener("keydown", (e) => {
  if (e.target.closest("input, select, dialog") || !viewer.picture) return;
  const onCanvas = e.target === $("canvas");
  if (e.key === " " && onCanvas) viewer.spaceHeld = true;
  else if ((e.ctrlKey || e.metaKey) && e.key === "z") viewer.undo();
  else if (e.ctrlKey || e.metaKey || e.altKey) return;
  else if (TOOLS[e.key]) {
    useTool(TOOLS[e.key]);
    if (e.key === "b" && onCanvas && !viewer.region) viewer.middleBox();
  } else if (onCanvas && ARROWS[e.key]) {
    const step = Math.max(1, Math.round(4 / viewer.view.scale));
    viewer.nudge(ARROWS[e.key][0] * step, ARROWS[e.key][1] * step, e.shiftKey);
  } else if (onCanvas && e.key === "Enter") viewer.closePolygon() || describe(asked());
  else if (e.key === "Escape") state.running ? state.running.abort() : viewer.clear();
  else if (e.key === "+" || e.key === "=") viewer.zoom(1.3);
  else if (e.key === "-") viewer.zoom(1 / 1.3);
  else if (e.key === "0") viewer.fit();
  else return;
  e.preventDefault();
});
document.addEventListener("keyup", (e) => e.key === " " && (viewer.spaceHeld = false));

async function begin() {
  const about = await (await fetch("samples")).json();
  $("model").textContent = about.model;
  $("about").textContent = about.note;
  $("about").hidden = !about.note;
  $("key").hidden = !about.needs_key;
  for (const id of ["prompt", "prompt-2"]) {
    for (const name of about.prompts) $(id).add(new Option(name, name));
  }
  $("prompt").value = about.prompts.includes(about.prompt) ? about.prompt : about.prompts[0];
  $("prompt-2").value = about.prompts.find((name) => name !== $("prompt").value);
  for (const sample of about.samples) $("samples").append(thumb(sample));
}

function thumb(sample) {
  const button = Object.assign(document.createElement("button"), { type: "button", className: "quiet" });
  const picture = Object.assign(document.createElement("img"), { className: "thumb", alt: "", loading: "lazy", src: `samples/${sample.name}/thumb` });
  button.append(picture, Object.assign(document.createElement("span"), { textContent: sample.title }));
  button.addEventListener("click", async () => {
    const data = await (await fetch(`samples/${sample.name}`)).blob();
    open(data, sample).catch(show);
  });
  return button;
}

begin().catch(() => show(new Error("The server cannot be reached.")));

/**
 * The page: which picture, which model, and what to show of its predictions.
 *
 * Whatever changes the picture, the model or the size runs the model once more; the other controls only draw again what
 * it found.
 */

import { colourOf, css, drawBoxes, drawClasses, drawMasks, drawTokens } from "./drawing.js";
import { Engine, EngineError, StoppedError } from "./engine.js";
import { testedSize } from "./image_tensor.js";

const SIDES = [256, 512, 768, 1024]; // lengths of the longest side that are offered
const UNTOLD_SIDE = 1024; // at most, for models that do not say at which size they were tested
const SMALLEST_SIDE = 33;

const element = (id) => document.getElementById(id);
const engine = new Engine();
const models = []; // {title, read(), examples, about}
let model = null;
let loaded = null; // the model that the engine has
let picture = null; // {name, bitmap}
let result = null; // what the model found, with the model that did
const hidden = new Set(); // classes of that model that are not drawn
let hiddenOf = null;

/** A sentence for the user. */
class Problem extends Error {}

// ------------------------------------------------------------------------------------- running the model

let asked = 0;
let running = false;

/** Predict for the current picture, and once more where something changes meanwhile. */
async function predict() {
  asked++;
  element("error").hidden = true;
  if (running) return;
  running = true;
  let answered;
  do {
    answered = asked;
    try {
      await predictOnce();
      tell(result ? "done" : "idle", result ? summary() : "");
    } catch (error) {
      if (error instanceof StoppedError) asked = answered;
      if (error.kind === "start") loaded = null;
      fail(error);
    }
  } while (answered !== asked);
  running = false;
}

async function predictOnce() {
  if (!model) return;
  if (loaded !== model) await load(model);
  if (!picture) return;
  const [width, height] = chosenSize();
  if (Math.min(width, height) < SMALLEST_SIDE) {
    throw new Problem(`${width} × ${height} pixels are too few: the model needs ${SMALLEST_SIDE} on each side. Choose ` +
      "a larger size.");
  }
  tell("busy", `Looking at ${width} × ${height} pixels…`);
  element("stop").hidden = false;
  const [of, on] = [model, picture];
  try {
    const found = await engine.run(on.bitmap, width, height);
    if (of !== model || on !== picture) return; // the next turn of the loop has what is wanted now
    if (hiddenOf !== of) hidden.clear();
    hiddenOf = of;
    result = { ...found, model: of };
    draw();
  } catch (error) {
    clearDrawing(); // which is another model's or size's
    if (error.kind !== "memory") throw error;
    endEngine(); // what ran out of memory may have left it in any state
    throw new Problem(`The browser has too little memory for ${width} × ${height} pixels. Choose a smaller size.`);
  }
}

async function load(wanted) {
  tell("busy", `Loading ${wanted.title}…`);
  try {
    const bytes = await wanted.read();
    wanted.about = await engine.load(bytes);
    loaded = wanted;
  } catch (error) {
    if (model === wanted) model = loaded; // that before it stays
    listModels();
    listSizes();
    if (error.kind === "memory") endEngine();
    if (!(error instanceof EngineError) || error.kind === "start") throw error;
    throw new Problem(
      {
        damaged: `${wanted.title} is not an ONNX file, or a damaged one.`,
        memory: `The browser has too little memory for ${wanted.title}.`,
        unsuitable: `${wanted.title} cannot be used here: ${error.message}.`,
        runtime: `onnxruntime cannot read ${wanted.title}: ${error.message}`,
      }[error.kind],
    );
  }
  if (!models.includes(wanted)) models.push(wanted);
  listModels();
  listSizes();
  listExamples();
  if (wanted.about.unread.length) {
    complain(`${wanted.title}: its ${wanted.about.unread.join(" and ")} cannot be read, and are left out.`);
  }
}

function endEngine() {
  engine.stop();
  loaded = null;
}

function chosenSize() {
  const { width, height } = picture.bitmap;
  const choice = element("size").value;
  if (choice === "tested") return testedSize(picture.bitmap, model.about.resize);
  const longest = Math.max(width, height);
  let side = longest;
  if (choice === "limited") side = Math.min(longest, UNTOLD_SIDE);
  else if (choice !== "original") side = Number(choice);
  return [width, height].map((x) => Math.max(1, Math.round((x * side) / longest)));
}

// ------------------------------------------------------------------------------------- telling

/** @param {"idle" | "busy" | "done" | "failed"} state What the page is doing, which its style shows too. */
function tell(state, text) {
  document.documentElement.dataset.state = state;
  element("viewer").setAttribute("aria-busy", state === "busy");
  element("stop").hidden = true;
  element("status").textContent = text;
}

function fail(error) {
  if (error instanceof StoppedError) {
    tell("idle", "Stopped.");
    return;
  }
  let text = error.message;
  if (error.kind === "start") text = `onnxruntime-web cannot start here: ${text}`;
  else if (error.kind === "runtime") text = `The model failed on this picture: ${text}`;
  else if (!(error instanceof Problem)) {
    console.error(error);
    text = `Something went wrong: ${text}`;
  }
  complain(text);
  tell("failed", "");
}

function complain(text) {
  element("error").textContent = text;
  element("error").hidden = false;
}

function summary() {
  const { width, height, milliseconds, threads, kept } = result;
  const time = milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;
  const parts = [`${time} for ${width} × ${height} pixels on ${threads} ${threads === 1 ? "thread" : "threads"}`];
  if (result.task === "detection") {
    const count = shownDetections(false).length;
    parts.unshift(`${count} ${count === 1 ? "object" : "objects"}`);
  }
  if (kept) parts.push(`${percent(keptShare())} of the tokens kept`);
  return parts.join(" · ");
}

const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.01 ? 1 : 0)} %`;
const keptShare = () => result.kept.data.reduce((sum, x) => sum + x, 0) / result.kept.data.length;
const nameOf = (label) => result.model.about.classes?.[label] ?? `class ${label}`;

// ------------------------------------------------------------------------------------- drawing

function draw() {
  const { task, kept, model: { about } } = result;
  const detects = task === "detection";
  element("view").hidden = false;
  element("threshold-row").hidden = !detects;
  element("threshold-value").textContent = Number(element("threshold").value).toFixed(2);
  if (detects) {
    const shown = shownDetections(true);
    drawMasks(element("map"), result, shown, about.palette);
    drawBoxes(element("boxes"), result, shown, about.palette, nameOf);
  } else {
    drawClasses(element("map"), result, about.palette, hidden);
    element("boxes").replaceChildren();
  }
  element("tokens-row").hidden = !kept;
  element("tokens").hidden = !kept || !element("show-tokens").checked;
  if (kept) {
    drawTokens(element("tokens"), result, about.tokenSize);
    const [count, all] = [kept.data.reduce((sum, x) => sum + x, 0), kept.data.length];
    element("tokens-text").textContent = `Kept tokens, ${count} of ${all}`;
  }
  drawLegend();
}

/** The detections that are sure enough, the surest first. */
function shownDetections(leaveOutHidden) {
  const threshold = Number(element("threshold").value);
  return result.detections
    .filter(({ score, label }) => score >= threshold && !(leaveOutHidden && hidden.has(label)))
    .sort((a, b) => b.score - a.score);
}

/** Each class that there is, with how much of it and whether it is drawn. */
function drawLegend() {
  const amounts = new Map();
  const labels = result.task === "detection" ? shownDetections(false).map(({ label }) => label) : result.labels;
  for (const label of labels) amounts.set(label, (amounts.get(label) ?? 0) + 1);
  const focused = document.activeElement?.dataset?.label;
  const entries = [...amounts].sort(([a, most], [b, more]) => more - most || a - b);
  element("legend").replaceChildren(
    ...entries.map(([label, amount]) => {
      const box = document.createElement("input");
      box.type = "checkbox";
      box.checked = !hidden.has(label);
      box.dataset.label = label;
      const swatch = document.createElement("span");
      swatch.className = "swatch";
      swatch.style.setProperty("--colour", css(colourOf(result.model.about.palette, label)));
      const name = document.createElement("span");
      name.className = "name";
      name.textContent = nameOf(label);
      const count = document.createElement("span");
      count.className = "amount";
      count.textContent = result.task === "detection" ? `${amount}` : percent(amount / result.labels.length);
      const row = document.createElement("label");
      row.className = "check";
      row.append(box, swatch, name, count);
      const item = document.createElement("li");
      item.append(row);
      return item;
    }),
  );
  if (focused !== undefined) element("legend").querySelector(`[data-label="${focused}"]`)?.focus();
}

function clearDrawing() {
  result = null;
  for (const id of ["map", "tokens"]) {
    element(id).width = 1; // which clears it
    element(id).height = 1;
  }
  element("boxes").replaceChildren();
  element("legend").replaceChildren();
}

// ------------------------------------------------------------------------------------- choosing

async function openPicture(blob, name, example = null) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob, { colorSpaceConversion: "none", premultiplyAlpha: "none" });
  } catch {
    fail(new Problem(`${name} is not a picture that this browser can read; try a PNG, JPEG or WebP file.`));
    return;
  }
  picture?.bitmap.close();
  picture = { name, bitmap };
  clearDrawing();
  const image = element("picture");
  URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(blob);
  image.alt = `The picture ${name}`;
  element("layers").style.setProperty("--aspect", bitmap.width / bitmap.height);
  element("layers").hidden = false;
  element("invitation").hidden = true;
  for (const button of element("examples").children) {
    button.setAttribute("aria-pressed", button === example);
  }
  listSizes();
  predict();
}

async function openExample(path, button) {
  try {
    await openPicture(await (await fetchFile(path)).blob(), path.split("/").pop(), button);
  } catch (error) {
    fail(error);
  }
}

function openModel(file) {
  choose({
    title: file.name,
    examples: [],
    read: async () => {
      try {
        return new Uint8Array(await file.arrayBuffer());
      } catch {
        throw new Problem(`${file.name} cannot be read, or is larger than this browser can load.`);
      }
    },
  });
}

function choose(wanted) {
  model = wanted;
  predict();
}

/** What was dropped or pasted: a model by its name, and anything else as a picture. */
function openFiles(files) {
  if (files.length > 1) fail(new Problem(`Those are ${files.length} files; give one picture or one model.`));
  else if (/\.onnx$/i.test(files[0]?.name)) openModel(files[0]);
  else if (files.length) openPicture(files[0], files[0].name);
}

async function fetchFile(path) {
  const response = await fetch(path).catch(() => null);
  if (!response?.ok) throw new Problem(`${path} cannot be loaded; is what serves this page still running?`);
  return response;
}

function listModels() {
  const select = element("model");
  select.replaceChildren(...models.map(({ title }) => new Option(title)));
  select.selectedIndex = models.indexOf(model);
  select.hidden = models.length === 0;
}

function listSizes() {
  const select = element("size");
  const before = select.value;
  const options = [];
  const size = ([width, height]) => `${width} × ${height}`;
  const about = model?.about;
  if (about?.resize) {
    options.push(new Option(picture ? `as tested: ${size(testedSize(picture.bitmap, about.resize))}` : "as tested", "tested"));
  } else {
    options.push(new Option(`as it is, ${UNTOLD_SIDE} at most`, "limited"));
  }
  const { width, height } = picture?.bitmap ?? {};
  options.push(new Option(picture ? `as it is: ${size([width, height])}` : "as it is", "original"));
  options.push(...SIDES.map((side) => new Option(`longest side ${side}`, side)));
  select.replaceChildren(...options);
  if (options.some(({ value }) => value === before)) select.value = before;
}

function listExamples() {
  const group = element("examples");
  const paths = loaded.examples;
  const same = group.dataset.paths === paths.join();
  if (same || (!paths.length && group.children.length)) return; // for models of the user's own those before
  group.dataset.paths = paths.join();
  group.hidden = !paths.length;
  group.replaceChildren(
    ...paths.map((path, i) => {
      const image = new Image();
      image.src = path;
      image.alt = `Example picture ${i + 1}`;
      const button = document.createElement("button");
      button.type = "button";
      button.setAttribute("aria-pressed", "false");
      button.append(image);
      button.addEventListener("click", () => openExample(path, button));
      return button;
    }),
  );
}

// ------------------------------------------------------------------------------------- listening

function takeFile(id, open) {
  element(id).addEventListener("change", ({ target }) => {
    const [file] = target.files;
    target.value = ""; // so that the same file can be given again
    if (file) open(file);
  });
}

takeFile("picture-file", (file) => openPicture(file, file.name));
takeFile("model-file", openModel);
element("model").addEventListener("change", ({ target }) => choose(models[target.selectedIndex]));
element("size").addEventListener("change", predict);
element("stop").addEventListener("click", endEngine);
element("opacity").addEventListener("input", ({ target }) => {
  element("layers").style.setProperty("--opacity", target.value);
});
for (const id of ["threshold", "show-tokens"]) {
  element(id).addEventListener("input", () => {
    if (result) draw();
    if (document.documentElement.dataset.state === "done") element("status").textContent = summary();
  });
}
element("legend").addEventListener("change", ({ target }) => {
  const label = Number(target.dataset.label);
  if (target.checked) hidden.delete(label);
  else hidden.add(label);
  draw();
});

let entered = 0; // elements that a file is being dragged over, each inside the one before
const isFile = (event) => event.dataTransfer?.types.includes("Files");
function drag(change) {
  entered = change === 0 ? 0 : entered + change;
  document.body.classList.toggle("dragging", entered > 0);
}
addEventListener("dragenter", (event) => isFile(event) && drag(1));
addEventListener("dragleave", (event) => isFile(event) && drag(-1));
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
  event.preventDefault(); // the browser would show the file in place of the page
  drag(0);
  openFiles([...event.dataTransfer.files]);
});
addEventListener("paste", (event) => openFiles([...event.clipboardData.files]));

// ------------------------------------------------------------------------------------- starting

async function start() {
  tell("idle", "");
  listSizes();
  for (const { title, file, examples } of await (await fetchFile("models.json")).json()) {
    models.push({ title, examples, read: async () => new Uint8Array(await (await fetchFile(file)).arrayBuffer()) });
  }
  listModels();
  if (!models.length) {
    tell("idle", "Open an ONNX file that tools/export_onnx.py wrote.");
    return;
  }
  model = models[0];
  await predict();
  if (!picture && document.documentElement.dataset.state !== "failed") element("examples").querySelector("button")?.click();
}

start().catch(fail);

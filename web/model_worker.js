/**
 * The model, in a thread of its own so that the page stays responsive.
 *
 * Takes `{id, load: Uint8Array}` and `{id, run: {bitmap, width, height}}`, and answers each with `{id, result}` or
 * `{id, error: {kind, message}}`.
 */

import * as ort from "./onnxruntime-web/ort.wasm.min.mjs";
import { imageTensor } from "./image_tensor.js";
import { UnsuitableModelError, describeModel } from "./model_description.js";
import { DamagedFileError, readMetadata } from "./onnx_metadata.js";

const MOST_THREADS = 4;

ort.env.logLevel = "error";
ort.env.wasm.wasmPaths = new URL("./onnxruntime-web/", import.meta.url).href;
// Threads share memory, which browsers allow only to pages that a server isolates from others.
const threads = self.crossOriginIsolated ? Math.min(MOST_THREADS, navigator.hardwareConcurrency || 1) : 1;
ort.env.wasm.numThreads = threads;

let session = null;
let model = null;

self.onmessage = async ({ data: { id, load: bytes, run: picture } }) => {
  try {
    const [result, transfer] = bytes ? await load(bytes) : await run(picture);
    self.postMessage({ id, result }, transfer);
  } catch (error) {
    self.postMessage({ id, error: explain(error) });
  }
};

async function load(bytes) {
  const metadata = readMetadata(bytes);
  const next = await ort.InferenceSession.create(bytes, { executionProviders: ["wasm"] });
  try {
    model = describeModel(next.inputNames, next.outputNames, metadata);
  } catch (error) {
    await next.release();
    throw error;
  }
  await session?.release();
  session = next;
  return [model, []];
}

async function run({ bitmap, width, height }) {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white"; // below what is transparent
  context.fillRect(0, 0, bitmap.width, bitmap.height);
  context.drawImage(bitmap, 0, 0);
  const { data: pixels } = context.getImageData(0, 0, bitmap.width, bitmap.height);
  const tensor = imageTensor(pixels, bitmap.width, bitmap.height, width, height);
  bitmap.close();

  const images = new ort.Tensor("float32", tensor, [1, 3, height, width]);
  const start = performance.now();
  const outputs = await session.run({ images }, model.fetches);
  const result = { task: model.task, width, height, threads, milliseconds: performance.now() - start };

  const transfer = [];
  const labels = smallIntegers(outputs.labels);
  if (model.task === "segmentation") {
    result.labels = labels;
    transfer.push(labels.buffer);
  } else {
    result.detections = detections(outputs, labels);
    transfer.push(...result.detections.filter((d) => d.mask).map((d) => d.mask.data.buffer));
  }
  if (outputs.kept) {
    const [, rows, columns] = outputs.kept.dims;
    result.kept = { rows, columns, data: Uint8Array.from(outputs.kept.data) };
    transfer.push(result.kept.data.buffer);
  }
  return [result, transfer];
}

/** Classes, which a model gives as integers of 64 bits: of each the lower half. */
function smallIntegers({ data }) {
  const halves = new Uint32Array(data.buffer, data.byteOffset, 2 * data.length);
  return Uint16Array.from({ length: data.length }, (_, i) => halves[2 * i]);
}

function detections({ boxes, scores, masks }, labels) {
  return Array.from(labels, (label, i) => ({
    label,
    score: scores.data[i],
    box: Array.from(boxes.data.subarray(4 * i, 4 * i + 4)),
    mask: masks && cropped(masks, i),
  }));
}

/** The part of a mask `(n, h, w)` that has anything in it, or null. */
function cropped({ data, dims: [, height, width] }, i) {
  const mask = data.subarray(i * height * width, (i + 1) * height * width);
  let [left, top, right, bottom] = [width, height, -1, -1];
  for (let y = 0; y < height; y++) {
    const row = mask.subarray(y * width, (y + 1) * width);
    const first = row.indexOf(1);
    if (first < 0) continue;
    left = Math.min(left, first);
    right = Math.max(right, row.lastIndexOf(1));
    top = Math.min(top, y);
    bottom = y;
  }
  if (bottom < 0) return null;
  const part = { left, top, width: right - left + 1, height: bottom - top + 1 };
  part.data = new Uint8Array(part.width * part.height);
  for (let y = 0; y < part.height; y++) {
    const start = (top + y) * width + left;
    part.data.set(mask.subarray(start, start + part.width), y * part.width);
  }
  return part;
}

function explain(error) {
  const text = String(error?.message ?? error)
    .trim()
    .split("\n")[0]
    .replace(/^.*ERROR_MESSAGE: /, "")
    .replace(/^\S+\.(cc|h):\d+ .*?\[ONNXRuntimeError\] : \d+ : /, "") // where in its sources
    .slice(0, 300);
  if (error instanceof DamagedFileError) return { kind: "damaged", message: text };
  if (error instanceof UnsuitableModelError) return { kind: "unsuitable", message: text };
  // What C++ throws arrives as a bare number.
  const memory = /bad_alloc|out of memory|out of bounds|allocat|Aborted|Array buffer|shape is too large/i;
  if (typeof error === "number" || error instanceof RangeError || memory.test(text)) {
    return { kind: "memory", message: text };
  }
  return { kind: "runtime", message: text };
}

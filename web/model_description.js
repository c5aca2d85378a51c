/** What a model is for, from the names of its inputs and outputs and from its metadata. */

/** A model that this page has no use for; the message says why. */
export class UnsuitableModelError extends Error {}

/**
 * @param {string[]} inputs Names.
 * @param {string[]} outputs Names.
 * @param {Map<string, string>} metadata As tools/export_onnx.py writes it; any of it may be missing.
 * @returns {{task: "segmentation" | "detection", fetches: string[], classes: ?string[], palette: ?number[][],
 *   resize: ?{scale: number[], keep_ratio: boolean}, tokenSize: ?number, unread: string[]}} `unread` names what was there
 *   and is not what it should be.
 * @throws {UnsuitableModelError} If it takes or gives something else.
 */
export function describeModel(inputs, outputs, metadata) {
  const has = (...names) => names.every((name) => outputs.includes(name));
  let task;
  if (has("labels", "logits")) task = "segmentation";
  else if (has("boxes", "scores", "labels")) task = "detection";
  if (inputs.join() !== "images" || !task) {
    throw new UnsuitableModelError(
      `it takes ${list(inputs)} and gives ${list(outputs)}, while this page needs a file that tools/export_onnx.py ` +
        "wrote: one that takes images, and gives logits and labels, or boxes, scores and labels",
    );
  }
  const wanted = task === "segmentation" ? ["labels", "kept"] : ["boxes", "scores", "labels", "masks", "kept"];
  const unread = [];

  function read(key, isRight) {
    if (!metadata.has(key)) return null;
    try {
      const value = JSON.parse(metadata.get(key));
      if (isRight(value)) return value;
    } catch {
      // not JSON, which is told with what is JSON of another kind
    }
    unread.push(key);
    return null;
  }

  return {
    task,
    fetches: wanted.filter((name) => has(name)),
    classes: read("classes", (x) => isListOf(x, (name) => typeof name === "string")),
    palette: read("palette", (x) => isListOf(x, (c) => isListOf(c, isByte) && c.length === 3)),
    resize: read("resize", (x) => isListOf(x?.scale, isPositive) && x.scale.length === 2),
    tokenSize: read("token_size", isPositive),
    unread,
  };
}

const isListOf = (x, isRight) => Array.isArray(x) && x.every(isRight);
const isByte = (x) => Number.isInteger(x) && x >= 0 && x <= 255;
const isPositive = (x) => Number.isInteger(x) && x > 0;
const list = (names) => names.slice(0, 6).join(", ") || "nothing";

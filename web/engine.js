/** The worker that has the model, as the page sees it. */

/** The user stopped what was under way. */
export class StoppedError extends Error {}

/** What the worker could not do; `kind` says what kind of failure it was. */
export class EngineError extends Error {
  constructor({ kind, message }) {
    super(message);
    this.kind = kind;
  }
}

export class Engine {
  #worker = null;
  #waiting = new Map();
  #questions = 0;

  /**
   * @param {Uint8Array} bytes An ONNX file. The worker takes them away.
   * @returns {Promise<object>} What `describeModel` says of it. Where it fails, the model before it stays.
   */
  load(bytes) {
    return this.#ask({ load: bytes }, [bytes.buffer]);
  }

  /**
   * @param {ImageBitmap} bitmap A picture; stays here.
   * @param {number} width To which the model is to see it resized.
   * @param {number} height Likewise.
   * @returns {Promise<object>} What the model found, see model_worker.js.
   */
  run(bitmap, width, height) {
    return this.#ask({ run: { bitmap, width, height } }, []);
  }

  /** End what is under way. The model is gone with it. */
  stop(error = new StoppedError()) {
    this.#worker?.terminate();
    this.#worker = null;
    for (const { reject } of this.#waiting.values()) reject(error);
    this.#waiting.clear();
  }

  #ask(question, transfer) {
    this.#worker ??= this.#start();
    const id = this.#questions++;
    return new Promise((resolve, reject) => {
      this.#waiting.set(id, { resolve, reject });
      this.#worker.postMessage({ id, ...question }, transfer);
    });
  }

  #start() {
    const worker = new Worker(new URL("./model_worker.js", import.meta.url), { type: "module" });
    worker.onmessage = ({ data: { id, result, error } }) => {
      const { resolve, reject } = this.#waiting.get(id);
      this.#waiting.delete(id);
      if (error) reject(new EngineError(error));
      else resolve(result);
    };
    worker.onerror = (event) => {
      event.preventDefault();
      this.stop(new EngineError({ kind: "start", message: event.message ?? "its files could not be read" }));
    };
    return worker;
  }
}

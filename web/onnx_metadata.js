/**
 * What an ONNX file says of itself, read without running anything in it.
 *
 * onnxruntime-web does not hand out a model's metadata. A file is a protobuf message: fields of a number, a kind and,
 * for those that matter here, a length. Only those of the outermost level are looked at.
 */

const METADATA_FIELD = 14; // ModelProto.metadata_props, of StringStringEntryProto
const KEY_FIELD = 1;
const VALUE_FIELD = 2;
const WITH_LENGTH = 2;

/** Not a protobuf message, or one that ends too early. */
export class DamagedFileError extends Error {}

/**
 * @param {Uint8Array} bytes The file.
 * @returns {Map<string, string>} Its metadata.
 * @throws {DamagedFileError} If it is no such file.
 */
export function readMetadata(bytes) {
  const text = new TextDecoder();
  const found = new Map();
  for (const [number, entry] of fields(bytes)) {
    if (number !== METADATA_FIELD) continue;
    const pair = new Map(fields(entry));
    found.set(text.decode(pair.get(KEY_FIELD)), text.decode(pair.get(VALUE_FIELD)));
  }
  return found;
}

/** Yields number and content, the latter empty for the kinds without a length. */
function* fields(bytes) {
  let position = 0;

  function varint() {
    let value = 0;
    for (let power = 1; power < 2 ** 64; power *= 128) {
      if (position >= bytes.length) throw new DamagedFileError();
      const byte = bytes[position++];
      value += (byte & 127) * power; // exact up to 2 ** 53, and above it no length fits a file
      if (byte < 128) return value;
    }
    throw new DamagedFileError();
  }

  while (position < bytes.length) {
    const tag = varint();
    const kind = tag % 8;
    const number = (tag - kind) / 8;
    let length = 0;
    if (kind === 0) varint();
    else if (kind === 1) length = 8;
    else if (kind === 5) length = 4;
    else if (kind === WITH_LENGTH) length = varint();
    else throw new DamagedFileError();
    if (number === 0 || length > bytes.length - position) throw new DamagedFileError();
    yield [number, bytes.subarray(position, position + (kind === WITH_LENGTH ? length : 0))];
    position += length;
  }
}

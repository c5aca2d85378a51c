/** Pictures as a model takes them. */

/**
 * @param {Uint8ClampedArray} pixels RGBA, row by row.
 * @param {number} width Of the picture.
 * @param {number} height Of the picture.
 * @param {number} newWidth Of what the model is to see.
 * @param {number} newHeight Of what the model is to see.
 * @returns {Float32Array} RGB from 0 to 255, `(3, newHeight, newWidth)`.
 *
 * Pixels between pixels are interpolated as in training, which uses OpenCV's bilinear interpolation: a browser's own
 * averages over all pixels where it makes a picture smaller, and each does so in its own way.
 */
export function imageTensor(pixels, width, height, newWidth, newHeight) {
  const size = newWidth * newHeight;
  const tensor = new Float32Array(3 * size);
  const columns = neighbours(width, newWidth);
  const rows = neighbours(height, newHeight);
  for (let y = 0, target = 0; y < newHeight; y++) {
    const above = rows.first[y] * width;
    const below = rows.second[y] * width;
    const down = rows.share[y];
    for (let x = 0; x < newWidth; x++, target++) {
      const left = columns.first[x];
      const right = columns.second[x];
      const across = columns.share[x];
      for (let channel = 0; channel < 3; channel++) {
        const topLeft = pixels[4 * (above + left) + channel];
        const topRight = pixels[4 * (above + right) + channel];
        const bottomLeft = pixels[4 * (below + left) + channel];
        const bottomRight = pixels[4 * (below + right) + channel];
        const top = topLeft + (topRight - topLeft) * across;
        const bottom = bottomLeft + (bottomRight - bottomLeft) * across;
        tensor[channel * size + target] = Math.round(top + (bottom - top) * down);
      }
    }
  }
  return tensor;
}

/** For each new pixel the two old ones beside its centre, and how near it is to the second. */
function neighbours(size, newSize) {
  const first = new Uint32Array(newSize);
  const second = new Uint32Array(newSize);
  const share = new Float64Array(newSize);
  for (let i = 0; i < newSize; i++) {
    const place = Math.min(Math.max(((i + 0.5) * size) / newSize - 0.5, 0), size - 1);
    first[i] = Math.floor(place);
    second[i] = Math.min(first[i] + 1, size - 1);
    share[i] = place - first[i];
  }
  return { first, second, share };
}

/**
 * The size at which a model was tested, as mmcv's `Resize` computes it.
 *
 * @param {{width: number, height: number}} picture
 * @param {{scale: number[], keep_ratio: boolean}} resize
 * @returns {number[]} Width and height.
 */
export function testedSize({ width, height }, { scale, keep_ratio }) {
  if (!keep_ratio) return scale;
  const factor = Math.min(
    Math.max(...scale) / Math.max(width, height),
    Math.min(...scale) / Math.min(width, height),
  );
  return [width, height].map((x) => Math.max(1, Math.floor(x * factor + 0.5)));
}

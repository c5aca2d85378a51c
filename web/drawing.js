/** What is drawn on a picture: class maps, masks, boxes and tokens, and which colour a class has. */

const DROPPED = [10, 11, 16, 150]; // over tokens that are gone

/**
 * @param {?number[][]} palette
 * @param {number} label
 * @returns {number[]} RGB. Where the palette ends, hues as far from each other as can be.
 */
export function colourOf(palette, label) {
  if (palette && label < palette.length) return palette[label];
  const hue = (label * 137.508) % 360;
  const channel = (offset) => {
    const place = (offset + hue / 30) % 12;
    return Math.round(255 * (0.5 - 0.35 * Math.max(-1, Math.min(place - 3, 9 - place, 1))));
  };
  return [channel(0), channel(8), channel(4)];
}

/** @returns {string} For a style sheet. */
export function css([red, green, blue]) {
  return `rgb(${red} ${green} ${blue})`;
}

/** @returns {string} Black or white, whichever is easier to read on a colour. */
export function readableOn([red, green, blue]) {
  return 0.299 * red + 0.587 * green + 0.114 * blue > 140 ? "#000" : "#fff";
}

/** Colour every pixel by its class, with the hidden ones left clear. */
export function drawClasses(canvas, { labels, width, height }, palette, hidden) {
  paint(canvas, width, height, (colours) => {
    const known = new Map();
    labels.forEach((label, i) => {
      if (hidden.has(label)) return;
      if (!known.has(label)) known.set(label, packed([...colourOf(palette, label), 255]));
      colours[i] = known.get(label);
    });
  });
}

/** Colour the masks of detections, of which the first lie on top. */
export function drawMasks(canvas, { width, height }, shown, palette) {
  paint(canvas, width, height, (colours) => {
    for (const { label, mask } of [...shown].reverse()) {
      if (!mask) continue;
      const colour = packed([...colourOf(palette, label), 255]);
      mask.data.forEach((inside, i) => {
        if (!inside) return;
        const y = mask.top + Math.floor(i / mask.width);
        colours[y * width + mask.left + (i % mask.width)] = colour;
      });
    }
  });
}

/** Put boxes with class and score over a picture. */
export function drawBoxes(container, { width, height }, shown, palette, nameOf) {
  const boxes = shown.map(({ label, score, box: [x1, y1, x2, y2] }) => {
    const box = document.createElement("div");
    box.className = "box";
    box.classList.toggle("at-top", y1 < 0.06 * height);
    box.classList.toggle("at-right", x1 > 0.75 * width);
    box.style.left = `${(100 * x1) / width}%`;
    box.style.top = `${(100 * y1) / height}%`;
    box.style.width = `${(100 * (x2 - x1)) / width}%`;
    box.style.height = `${(100 * (y2 - y1)) / height}%`;
    const colour = colourOf(palette, label);
    box.style.setProperty("--colour", css(colour));
    box.style.setProperty("--on-colour", readableOn(colour));
    const text = document.createElement("span");
    text.textContent = `${nameOf(label)} ${score.toFixed(2)}`;
    box.append(text);
    return box;
  });
  container.replaceChildren(...boxes.reverse()); // the surest on top
}

/** Darken the tokens that are gone. The grid may reach beyond the picture, at the bottom and on the right. */
export function drawTokens(canvas, { width, height, kept }, tokenSize) {
  const size = tokenSize ?? smallestToken(width, height, kept);
  paint(canvas, kept.columns, kept.rows, (colours) => {
    const dropped = packed(DROPPED);
    kept.data.forEach((stays, i) => {
      if (!stays) colours[i] = dropped;
    });
  });
  canvas.style.width = `${(100 * kept.columns * size) / width}%`;
  canvas.style.height = `${(100 * kept.rows * size) / height}%`;
}

/** A file that does not tell: the smallest power of two with which the grid covers the picture. */
function smallestToken(width, height, { rows, columns }) {
  let size = 1;
  while (columns * size < width || rows * size < height) size *= 2;
  return size;
}

function paint(canvas, width, height, fill) {
  canvas.width = width;
  canvas.height = height;
  const image = new ImageData(width, height);
  fill(new Uint32Array(image.data.buffer));
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** RGBA as the one number that a canvas has in its memory. */
function packed(rgba) {
  return new Uint32Array(Uint8Array.from(rgba).buffer)[0];
}

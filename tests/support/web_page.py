"""The web page in a browser, with its drawings as arrays."""

import base64
import io
import json
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from page_server import PageServer
from PIL import Image

from .browser import Browser, Page, find_browser

ROOT = Path(__file__).resolve().parents[2]
RUNTIME = ROOT / "build" / "web" / "site" / "onnxruntime-web"

# Counts how often models are loaded and run, and what the page's policy refuses.
_WATCH = """
window.loads = 0;
window.runs = 0;
window.violations = [];
addEventListener("securitypolicyviolation", (event) => violations.push(event.blockedURI));
const post = Worker.prototype.postMessage;
Worker.prototype.postMessage = function (message, ...rest) {
  if (message.load) window.loads++;
  if (message.run) window.runs++;
  return post.call(this, message, ...rest);
};
"""


def skip_without_browser():
    """Skip what asks for it where the page cannot run."""
    if find_browser() is None:
        pytest.skip("no Chromium: `make setup-web` says how to get one")
    if not RUNTIME.is_dir():
        pytest.skip("no onnxruntime-web: `make setup-web` fetches it")


@contextmanager
def served(folder, models=()):
    """The address of the page, with the given entries in its ``models.json``."""
    shutil.copytree(ROOT / "web", folder, dirs_exist_ok=True)
    # Copied: the server follows no link out of its folder.
    shutil.copytree(RUNTIME, folder / RUNTIME.name)
    (folder / "models.json").write_text(json.dumps(list(models)))
    with PageServer(folder, 0) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield server.address
        finally:
            server.stop()
            thread.join()


@contextmanager
def viewer(folder, models=()):
    """A :class:`Viewer` in a browser and a server of its own."""
    browser = Browser(folder / "profile")
    try:
        with (
            served(folder / "site", models) as address,
            browser.page(address, before=_WATCH) as page,
        ):
            yield Viewer(page, address, folder / "site")
    finally:
        browser.close()


def coloured(labels, colours):
    """A class map ``(H, W)`` as it is to be drawn, RGBA."""
    return np.dstack([np.asarray(colours, np.uint8)[labels], np.full(labels.shape, 255, np.uint8)])


def masks_drawn(masks, labels, scores, colours):
    """Masks ``(n, H, W)`` as they are to be drawn, RGBA: in their classes' colours, the surest on top."""
    pixels = np.zeros((*masks.shape[1:], 4), np.uint8)
    for i in np.argsort(scores, kind="stable"):
        pixels[masks[i]] = [*colours[labels[i]], 255]
    return pixels


class Viewer:
    """The page, by what a user does and sees.

    Args:
        page: A tab with it.
        address: Of its server.
        site: The folder that is served.
    """

    def __init__(self, page: Page, address: str, site=None):
        self.page, self.address, self.site = page, address, site
        page.wait("document.documentElement.dataset.state === 'idle'")

    @contextmanager
    def settling(self):
        """Wait until the page is done with what is done inside."""
        root = "document.documentElement.dataset.state"
        self.page.evaluate(f"void ({root} = 'waiting')")
        yield
        self.page.wait(f"['idle', 'done', 'failed'].includes({root})")

    def give_picture(self, path):
        with self.settling():
            self.page.give_file("picture-file", path)

    def open_model(self, path):
        with self.settling():
            self.page.give_file("model-file", path)

    def drop(self, *paths):
        with self.settling():
            self.page.drop(paths)

    def set(self, control, value, event="input"):
        """Move or choose, as a user would, what a control says."""
        self.page.evaluate(
            f"""{{
                const control = document.getElementById("{control}");
                control[control.type === "checkbox" ? "checked" : "value"] = {json.dumps(value)};
                control.dispatchEvent(new Event("{event}", {{ bubbles: true }}));
            }}"""
        )

    def text(self, element):
        """Return an element's visible text; empty if it is hidden."""
        return self.page.evaluate(
            f"(x => x.checkVisibility() ? x.innerText : '')(document.getElementById('{element}'))"
        )

    @property
    def error(self):
        return self.text("error")

    @property
    def runs(self):
        return self.page.evaluate("runs")

    def drawn(self, canvas):
        """The pixels of a canvas, RGBA ``(H, W, 4)``, or None where it is hidden."""
        url = self.page.evaluate(
            f"(x => x.checkVisibility() ? x.toDataURL() : null)(document.getElementById('{canvas}'))"
        )
        if url is None:
            return None
        image = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
        return np.array(image.convert("RGBA"))

    def place(self, selector):
        """Left, top, right and bottom of each element, in widths and heights of the picture, ``(n, 4)``."""
        found = self.page.evaluate(
            f"""(() => {{
                const all = document.getElementById("picture").getBoundingClientRect();
                return [...document.querySelectorAll("{selector}")].map((element) => {{
                    const box = element.getBoundingClientRect();
                    const [x, y] = [(v) => (v - all.left) / all.width, (v) => (v - all.top) / all.height];
                    return [x(box.left), y(box.top), x(box.right), y(box.bottom)];
                }});
            }})()"""
        )
        return np.array(found).reshape(-1, 4)

    def boxes(self):
        """Return each box's label, the highest score last, and its position in widths and heights of the picture."""
        boxes = "[...document.querySelectorAll('.box')]"
        return self.page.evaluate(f"{boxes}.map((box) => box.innerText)"), self.place(".box")

    def colours(self, palette, count):
        """Return the colours of the first classes, RGB ``(count, 3)``."""
        colours = f"Array.from({{ length: {count} }}, (_, i) => colourOf({json.dumps(palette)}, i))"
        found = self.page.evaluate(f"import('/drawing.js').then(({{ colourOf }}) => {colours})")
        return np.array(found, np.uint8)

    def legend(self):
        """Return the text of each class in the legend."""
        return self.page.evaluate(
            """Object.fromEntries([...document.querySelectorAll("#legend li")].map((item) =>
                [item.querySelector(".name").innerText, item.querySelector(".amount").innerText]))"""
        )

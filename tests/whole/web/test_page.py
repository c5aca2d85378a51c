"""The web page in a browser, with models of a few nodes, against onnxruntime in Python."""

import json
import re
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
import onnxruntime
from onnx import helper, parser

from support.web_page import Viewer, coloured, masks_drawn, skip_without_browser, viewer

CLASSES = ["red", "<img src=x onerror=alert(1)>", "blue"]
PALETTE = [[200, 10, 20], [30, 210, 40], [50, 60, 220]]
TOKEN = 8
HEADER = '<ir_version: 10, opset_import: ["" : 18]>'
IMAGES = "float[batch, 3, height, width] images"
SEGMENTER = f"""{HEADER} agraph ({IMAGES})
    => (float[batch, 3, height, width] logits, int64[batch, height, width] labels) {{
    logits = Identity (images)
    labels = ArgMax <axis = 1, keepdims = 0> (images)
}}"""
PRUNED = f"""{HEADER} agraph ({IMAGES})
    => (float[batch, 3, height, width] logits, int64[batch, height, width] labels, bool[batch, h, w] kept) {{
    logits = Identity (images)
    labels = ArgMax <axis = 1, keepdims = 0> (images)
    tokens = MaxPool <kernel_shape = [{TOKEN}, {TOKEN}], strides = [{TOKEN}, {TOKEN}], ceil_mode = 1> (images)
    one = Constant <value = int64[1] {{1}}> ()
    red = ReduceMean <keepdims = 0> (tokens, one)
    middle = ReduceMean (red)
    kept = Greater (red, middle)
}}"""
DETECTOR = f"""{HEADER} agraph (float[1, 3, height, width] images)
    => (float[n, 4] boxes, float[n] scores, int64[n] labels, bool[n, height, width] masks) {{
    boxes = Constant <value = float[3, 4] {{10.5, 20.0, 60.0, 50.25, 0.0, 0.0, 90.0, 70.0, 70.0, 2.0, 88.0, 69.0}}> ()
    scores = Constant <value = float[3] {{0.9, 0.6, 0.2}}> ()
    labels = Constant <value = int64[3] {{0, 1, 0}}> ()
    zero = Constant <value = int64[1] {{0}}> ()
    channels = Squeeze (images, zero)
    bright = Constant <value = float {{150.0}}> ()
    masks = Greater (channels, bright)
}}"""
ENDLESS = f"""{HEADER} agraph ({IMAGES}) => (float[batch, 3, height, width] logits, int64[a, b, c] labels) {{
    times = Constant <value = int64 {{1000000000000}}> ()
    yes = Constant <value = bool {{1}}> ()
    one = Constant <value = float {{1.0}}> ()
    logits = Loop <body = steps (int64 i, bool go, float[?, ?, ?, ?] x)
        => (bool go_on, float[?, ?, ?, ?] y) {{
            go_on = Identity (go)
            y = Add (x, one)
        }}> (times, yes, images)
    labels = ArgMax <axis = 1, keepdims = 0> (logits)
}}"""
ENORMOUS = f"""{HEADER} agraph ({IMAGES}) => (float[a, b, c, d] logits, int64[x, y, z] labels) {{
    shape = Shape (images)
    many = Constant <value = int64[4] {{TIMES}}> ()
    large = Mul (shape, many)
    one = Constant <value = float {{1.0}}> ()
    logits = Expand (one, large)
    labels = ArgMax <axis = 1, keepdims = 0> (logits)
}}"""
CLASSIFIER = f"{HEADER} agraph ({IMAGES}) => (float[batch, 3, height, width] scores) {{ scores = Neg (images) }}"


def write_model(path, text, **metadata):
    model = parser.parse_model(text)
    metadata = {"classes": CLASSES, "palette": PALETTE} | metadata
    helper.set_model_props(
        model, {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
    )
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def write_picture(path, width=90, height=70, seed=0, **options):
    """Blocks of colours on noise."""
    random = np.random.RandomState(seed)
    coarse = random.randint(0, 256, (4, 5, 3), np.uint8)
    blocks = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST)
    noise = random.randint(0, 40, (height, width, 3))
    Image.fromarray((blocks * (215 / 255) + noise).astype(np.uint8)).save(path, **options)
    return path


def pixels_of(picture):
    return np.array(Image.open(picture).convert("RGB"))


def expected(model, pixels):
    """Run onnxruntime on RGB pixels ``(H, W, 3)``."""
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    images = pixels.transpose(2, 0, 1)[None].astype(np.float32)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"images": images})))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """One for all tests here: each opens the model and the picture that it is about."""
    skip_without_browser()
    with viewer(tmp_path_factory.mktemp("page")) as opened:
        yield opened


@pytest.fixture
def models(tmp_path):
    """Writes a model of its text."""
    return lambda text, name="model.onnx", **metadata: write_model(
        tmp_path / name, text, **metadata
    )


@pytest.fixture
def picture(tmp_path):
    return write_picture(tmp_path / "picture.png")


# ----------------------------------------------------------------------------------- what is drawn


def test_a_class_map_is_onnxruntimes(page, models, picture):
    model = models(SEGMENTER)
    page.open_model(model)
    page.give_picture(picture)
    labels = expected(model, pixels_of(picture))["labels"][0]
    assert len(np.unique(labels)) == 3
    assert page.error == ""
    assert np.array_equal(page.drawn("map"), coloured(labels, PALETTE))
    shares = {name: f"{100 * np.mean(labels == i):.0f} %" for i, name in enumerate(CLASSES)}
    assert page.legend() == shares
    assert re.fullmatch(r"\d+ ms for 90 × 70 pixels on \d threads?", page.text("status"))


def test_the_map_lies_on_the_picture(page, models, picture):
    page.open_model(models(SEGMENTER))
    page.give_picture(picture)
    np.testing.assert_allclose(page.place("#map"), [[0, 0, 1, 1]], atol=1e-3)
    width, height = page.page.evaluate(
        "(x => [x.width, x.height])(document.getElementById('picture').getBoundingClientRect())"
    )
    assert width / height == pytest.approx(90 / 70, rel=0.01)
    alt = page.page.evaluate("document.getElementById('picture').alt")
    assert "picture.png" in alt


def test_opacity_and_hidden_classes_need_no_run(page, models, picture):
    model = models(SEGMENTER)
    page.open_model(model)
    page.give_picture(picture)
    runs = page.runs
    page.set("opacity", "0.25")
    opacity = page.page.evaluate("getComputedStyle(document.getElementById('map')).opacity")
    assert float(opacity) == 0.25
    page.page.evaluate("document.querySelector('#legend [data-label=\"2\"]').click()")
    labels = expected(model, pixels_of(picture))["labels"][0]
    shown = coloured(labels, PALETTE) * (labels != 2)[..., None]
    assert np.array_equal(page.drawn("map"), shown)
    assert page.runs == runs


def test_detections_are_onnxruntimes(page, models, picture):
    model = models(DETECTOR)
    page.open_model(model)
    page.give_picture(picture)
    found = expected(model, pixels_of(picture))
    page.set("threshold", "0.1")
    texts, boxes = page.boxes()
    expected_texts = [f"{CLASSES[i]} {s:.2f}" for i, s in zip(found["labels"], found["scores"])]
    assert texts == expected_texts[::-1] and len(texts) == 3
    np.testing.assert_allclose(boxes, found["boxes"][::-1] / [90, 70, 90, 70], atol=1e-3)
    drawn = masks_drawn(found["masks"], found["labels"], found["scores"], PALETTE)
    assert np.array_equal(page.drawn("map"), drawn)
    assert page.text("status").startswith("3 objects · ")
    assert page.legend() == {CLASSES[0]: "2", CLASSES[1]: "1"}


def test_the_threshold_needs_no_run(page, models, picture):
    model = models(DETECTOR)
    page.open_model(model)
    page.give_picture(picture)
    runs = page.runs
    page.set("threshold", "0.7")
    assert page.boxes()[0] == ["red 0.90"]
    mask = expected(model, pixels_of(picture))["masks"][0]
    assert np.array_equal(
        page.drawn("map"), coloured(np.zeros_like(mask, int), PALETTE) * mask[..., None]
    )
    assert page.text("threshold-value") == "0.70" and page.text("status").startswith("1 object · ")
    page.set("threshold", "0.95")
    assert page.boxes()[0] == [] and not page.drawn("map").any()
    assert page.runs == runs


def test_a_detector_without_masks(page, models, picture):
    boxes_alone = DETECTOR.replace(", bool[n, height, width] masks", "")
    boxes_alone = re.sub(r"\n    masks = .*", "", boxes_alone)
    page.open_model(models(boxes_alone))
    page.give_picture(picture)
    page.set("threshold", "0.1")
    assert page.error == "" and len(page.boxes()[0]) == 3 and not page.drawn("map").any()


def test_kept_tokens_are_onnxruntimes(page, models, picture):
    """In a picture whose sides are no multiples of a token's."""
    model = models(PRUNED, token_size=TOKEN)
    page.open_model(model)
    page.give_picture(picture)
    kept = expected(model, pixels_of(picture))["kept"][0]
    assert kept.shape == (9, 12) and 0 < kept.sum() < kept.size
    tokens = page.drawn("tokens")
    assert np.array_equal(tokens[..., 3] == 0, kept)
    ((_, _, right, bottom),) = page.place("#tokens")
    np.testing.assert_allclose([right, bottom], [12 * TOKEN / 90, 9 * TOKEN / 70], atol=5e-3)
    assert f"{kept.sum()} of {kept.size}" in page.text("tokens-text")
    page.set("show-tokens", False)
    assert page.drawn("tokens") is None
    page.set("show-tokens", True)


def test_a_file_that_says_nothing_of_itself(page, models, picture, tmp_path):
    model = parser.parse_model(PRUNED)
    onnx.save(model, tmp_path / "silent.onnx")
    page.open_model(tmp_path / "silent.onnx")
    page.give_picture(picture)
    assert page.error == ""
    assert set(page.legend()) == {"class 0", "class 1", "class 2"}
    labels = expected(tmp_path / "silent.onnx", pixels_of(picture))["labels"][0]
    drawn = page.drawn("map")
    colours = [np.unique(drawn[labels == i], axis=0) for i in range(3)]
    assert [len(x) for x in colours] == [1, 1, 1] and len(np.unique(colours, axis=0)) == 3
    ((_, _, right, _),) = page.place("#tokens")
    assert right == pytest.approx(12 * TOKEN / 90, abs=5e-3)


def test_metadata_that_cannot_be_read(page, models, picture):
    page.open_model(models(SEGMENTER))
    page.give_picture(picture)
    page.open_model(models(SEGMENTER, "odd.onnx", classes="[1, 2", palette=[[300, 0, 0]]))
    assert page.error == "odd.onnx: its classes and palette cannot be read, and are left out."
    assert set(page.legend()) == {"class 0", "class 1", "class 2"}
    assert page.drawn("map").shape == (70, 90, 4)


# ------------------------------------------------------------------------------------ what goes in


def test_a_photograph_is_turned_as_its_file_says(page, models, tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    photo = write_picture(tmp_path / "photo.jpg", exif=exif, quality=98, subsampling=0)
    model = models(SEGMENTER)
    page.open_model(model)
    page.give_picture(photo)
    turned = np.rot90(pixels_of(photo), -1)
    labels = expected(model, turned)["labels"][0]
    drawn = page.drawn("map")
    assert drawn.shape == (90, 70, 4)
    assert (drawn == coloured(labels, PALETTE)).all(-1).mean() > 0.99


def test_sizes_are_those_of_testing(page, models, tmp_path):
    """The page resizes like mmcv, or to the user's choice."""
    wide = write_picture(tmp_path / "wide.png", 300, 110)
    page.open_model(models(SEGMENTER, resize=dict(scale=[120, 200], keep_ratio=True)))
    page.give_picture(wide)
    assert page.drawn("map").shape == (73, 200, 4)
    for size, shape in [("original", (110, 300, 4)), ("256", (94, 256, 4))]:
        with page.settling():
            page.set("size", size, "change")
        assert page.drawn("map").shape == shape
    with page.settling():
        page.set("size", "tested", "change")
    page.open_model(models(SEGMENTER, resize=dict(scale=[64, 48], keep_ratio=False)))
    assert page.drawn("map").shape == (48, 64, 4)


@pytest.mark.parametrize("size", [(31, 17), (40, 60), (200, 130), (97, 64)], ids=str)
def test_resizing_is_opencvs(page, size):
    random = np.random.RandomState(1)
    width, height = 97, 64
    pixels = random.randint(0, 256, (height, width, 4), np.uint8)
    found = page.page.evaluate(
        f"""import("/image_tensor.js").then(({{ imageTensor }}) => Array.from(imageTensor(
            Uint8ClampedArray.from({pixels.ravel().tolist()}), {width}, {height}, {size[0]}, {size[1]})))"""
    )
    found = np.array(found).reshape(3, *size[::-1]).transpose(1, 2, 0)
    resized = cv2.resize(pixels[..., :3], size, interpolation=cv2.INTER_LINEAR)
    assert np.abs(found - resized).max() <= 1  # OpenCV computes in integers


def test_transparent_pictures_lie_on_white(page, models, tmp_path):
    pixels = np.zeros((40, 50, 4), np.uint8)
    pixels[:, :25] = [0, 100, 0, 255]
    Image.fromarray(pixels).save(tmp_path / "half.png")
    page.open_model(models(DETECTOR))
    page.give_picture(tmp_path / "half.png")
    page.set("threshold", "0.1")
    bright = page.drawn("map")[..., 3] > 0
    assert np.array_equal(bright, np.arange(50)[None].repeat(40, 0) >= 25)


# ------------------------------------------------------------------------------------ what is wrong


def test_a_text_file_is_dropped(page, models, picture, tmp_path):
    page.open_model(models(SEGMENTER))
    page.drop(picture)
    before = page.drawn("map")
    assert before.shape == (70, 90, 4) and page.error == ""
    (tmp_path / "notes.txt").write_text("not a picture")
    page.drop(tmp_path / "notes.txt")
    assert page.error.startswith("notes.txt is not a picture that this browser can read")
    assert np.array_equal(page.drawn("map"), before)
    page.drop(picture, tmp_path / "notes.txt")
    assert page.error == "Those are 2 files; give one picture or one model."


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be used|cannot read"),
        (b"hello, world", "is not an ONNX file, or a damaged one"),
        (b"\x08\x0a\x3a\xff\xff\xff\xff\x7f", "is not an ONNX file, or a damaged one"),
        (b"\xff" * 40, "is not an ONNX file, or a damaged one"),
        (b"\x08\x0a\x12\x01x", "onnxruntime cannot read broken.onnx: "),
    ],
    ids=["empty", "text", "length", "varint", "no graph"],
)
def test_a_broken_model(page, models, picture, tmp_path, content, words):
    """The one before it stays."""
    model = models(SEGMENTER)
    page.open_model(model)
    (tmp_path / "broken.onnx").write_bytes(content)
    page.drop(tmp_path / "broken.onnx")
    assert re.search(words, page.error) and "\n" not in page.error
    page.give_picture(picture)
    assert page.error == "" and page.drawn("map").shape == (70, 90, 4)
    chosen = page.page.evaluate("document.getElementById('model').selectedOptions[0].text")
    assert chosen == model.name


def test_half_a_model(page, models, tmp_path):
    whole = models(SEGMENTER).read_bytes()
    (tmp_path / "half.onnx").write_bytes(whole[: len(whole) // 2])
    page.open_model(tmp_path / "half.onnx")
    assert page.error == "half.onnx is not an ONNX file, or a damaged one."


def test_a_model_for_something_else(page, models):
    page.open_model(models(CLASSIFIER, "classifier.onnx"))
    assert page.error.startswith(
        "classifier.onnx cannot be used here: it takes images and gives scores, while this page needs"
    )


def test_a_picture_that_is_too_small(page, models, tmp_path):
    page.open_model(models(SEGMENTER))
    page.give_picture(write_picture(tmp_path / "tiny.png", 20, 30))
    assert page.error.startswith("20 × 30 pixels are too few")
    with page.settling():
        page.set("size", "256", "change")
    assert page.error == "" and page.drawn("map").shape == (256, 171, 4)
    page.set("size", "limited", "change")


@pytest.mark.parametrize("times", ["8, 10, 10, 71", "4000, 4000, 1, 1"], ids=["4 GB", "1200 GB"])
def test_too_little_memory(page, models, picture, times):
    page.open_model(models(ENORMOUS.replace("TIMES", times)))
    page.give_picture(picture)
    assert page.error == (
        "The browser has too little memory for 90 × 70 pixels. Choose a smaller size."
    )
    loads = page.page.evaluate("loads")
    page.give_picture(picture)
    assert page.page.evaluate("loads") == loads + 1  # in another worker, with memory of its own
    page.open_model(models(SEGMENTER))
    assert page.error == "" and page.drawn("map").shape == (70, 90, 4)


def test_stopping(page, models, picture):
    page.open_model(models(SEGMENTER))
    page.give_picture(picture)
    page.page.give_file("model-file", models(ENDLESS, "endless.onnx"))
    page.page.wait("document.getElementById('stop').checkVisibility()")
    assert page.text("status") == "Looking at 90 × 70 pixels…"
    with page.settling():
        page.page.evaluate("document.getElementById('stop').click()")
    assert page.text("status") == "Stopped." and page.error == ""
    assert page.legend() == {} and not page.drawn("map").any()
    page.set("threshold", "0.3")
    page.set("show-tokens", True)
    assert page.page.events("Runtime.exceptionThrown") == []
    page.open_model(models(SEGMENTER))
    assert page.error == "" and page.drawn("map").shape == (70, 90, 4)


# --------------------------------------------------------------------------------- the page itself


def test_it_asks_nobody_else(page, models, picture):
    page.open_model(models(DETECTOR))
    page.give_picture(picture)
    requested = {x["request"]["url"] for x in page.page.events("Network.requestWillBeSent")}
    own = {url for url in requested if url.startswith((page.address, f"blob:{page.address}"))}
    assert own == requested and len(own) > 5
    assert page.page.evaluate("violations") == []
    assert page.page.events("Runtime.exceptionThrown") == []


def test_threads_are_allowed(page):
    assert page.page.evaluate("crossOriginIsolated")


def test_on_any_web_server(page, models, picture, tmp_path):
    """A server without the headers: the page works, without threads."""
    model = models(SEGMENTER)
    with another_server(page) as address, page.page.browser.page(address) as tab:
        other = Viewer(tab, address)
        assert not tab.evaluate("crossOriginIsolated")
        other.open_model(model)
        other.give_picture(picture)
        assert other.error == "" and other.text("status").endswith("on 1 thread")
        labels = expected(model, pixels_of(picture))["labels"][0]
        assert np.array_equal(other.drawn("map"), coloured(labels, PALETTE))


@contextmanager
def another_server(page):
    """Python's own, for the same files."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(page.site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_by_keyboard(page, models, picture):
    """From one control to the next, each of them marked, and the threshold moved."""
    page.open_model(models(DETECTOR))
    page.give_picture(picture)
    page.set("threshold", "0.58")
    page.page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(12):
        page.page.press("Tab")
        reached.append(page.page.evaluate("document.activeElement.id"))
        if reached[-1] == "threshold":
            break
    assert [x for x in reached if x] == [
        *("picture-file", "model", "model-file", "size", "opacity", "threshold")
    ]
    assert len(page.boxes()[0]) == 2
    for _ in range(4):
        page.page.press("ArrowRight")
    assert page.text("threshold-value") == "0.62" and len(page.boxes()[0]) == 1
    outline = page.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [320, 390, 1200])
def test_widths_and_colours(page, models, picture, width, dark):
    """Nothing is wider than a telephone, and text is readable on what it stands on (WCAG: 4.5 to 1)."""
    page.open_model(
        models(PRUNED, "a_model_whose_name_is_longer_than_any_telephone_is_wide_" * 2 + ".onnx")
    )
    page.give_picture(picture)
    try:
        page.page.resize(width, 800, dark=dark)
        assert page.page.evaluate("document.documentElement.scrollWidth") <= width
        texts = ["#status", "#size", "#tokens-text", ".amount", "header p", ".button", ".primary"]
        for selector in texts:
            assert contrast(page, selector) >= 4.5, selector
    finally:
        page.page.resize(1200, 900)


def contrast(page, selector):
    """Compute the contrast between an element's text and its background."""
    colours = page.page.evaluate(
        f"""(() => {{
            let element = document.querySelector("{selector}");
            const text = getComputedStyle(element).color;
            let behind;
            do {{
                behind = getComputedStyle(element).backgroundColor;
                element = element.parentElement;
            }} while (behind === "rgba(0, 0, 0, 0)");
            return [text, behind];
        }})()"""
    )
    light, dark = sorted(map(luminance, colours), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour):
    channels = np.array(re.findall(r"[\d.]+", colour)[:3], float) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def test_every_control_and_picture_has_a_name(page, models, picture):
    """A screen reader has a name for each, by the browser's accessibility tree."""
    page.open_model(models(PRUNED))
    page.give_picture(picture)
    nodes = page.page.call("Accessibility.getFullAXTree")["nodes"]
    named = {"button", "combobox", "slider", "checkbox", "image", "img", "list"}
    shown = [node for node in nodes if not node["ignored"] and node["role"]["value"] in named]
    assert len(shown) > 6
    assert [node for node in shown if not node.get("name", {}).get("value")] == []

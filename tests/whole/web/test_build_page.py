"""Building the web page and serving it."""

import http.client
import json
import os
import re
import shutil
import socket
import threading
from contextlib import contextmanager
from pathlib import Path

import build_page as module
import page_server
import pytest
import torch
from build_page import package_sources, web, web_parser
from page_server import POLICY, PageServer

from mmvssm.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "web"
CONFIG = """
default_scope = "mmseg"
model = dict(
    type="EncoderDecoder",
    backbone=dict(type="mmvssm.BACKBONE", pruning=PRUNING),
    decode_head=dict(type="UPerHead"),
)
test_dataloader = dict(
    dataset=dict(data_root="data/", data_prefix=dict(img_path="val2017"), pipeline=[])
)
"""
DENSE = CONFIG.replace("BACKBONE", "GroupMamba").replace("PRUNING", "None")
PRUNED = CONFIG.replace("BACKBONE", "PlainMamba").replace("PRUNING", "'L1'")


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Calls the tool in a folder with onnxruntime-web in place; what it exports is its list of arguments."""
    monkeypatch.chdir(tmp_path)
    Path("build/web/site/onnxruntime-web").mkdir(parents=True)
    exported = []

    def export(args):
        exported.append(Path(args.checkpoint).name)
        Path(args.out).write_text(f"{args.config} {args.checkpoint} {args.cfg_options}")

    monkeypatch.setattr(module, "export_onnx", export)

    def call(*arguments):
        exported.clear()
        web(web_parser().parse_args([*map(str, arguments), "--build-only"]), PAGE)
        site = Path("build/web/site")
        return site, json.loads((site / "models.json").read_text()), list(exported)

    return call


def write_run(folder, text=DENSE, checkpoints=("best_mIoU_iter_600.pth",)):
    """Write the files of a training."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    (folder / f"{folder.name}.py").write_text(text)
    for i, name in enumerate(checkpoints):
        torch.save({}, folder / name)
        os.utime(folder / name, (1e9 + i, 1e9 + i))
    return folder / f"{folder.name}.py"


def write_pictures(folder, names):
    Path(folder).mkdir(parents=True)
    for name in names:
        (Path(folder) / name).write_bytes(name.encode())


# ---------------------------------------------------------------------------------------- building


def test_demo_models_that_are_there(build):
    write_run(
        "work_dirs/groupmamba_upernet_shapes",
        checkpoints=("best_1.pth", "best_2.pth", "iter_9.pth"),
    )
    write_run("work_dirs/plainmamba_pruned_upernet_shapes", PRUNED)
    write_run("work_dirs/groupmamba_maskrcnn_shapes", DENSE, checkpoints=["epoch_1.pth"])
    write_run("work_dirs/something_else", checkpoints=["best_1.pth"])
    last = write_run(
        "work_dirs/plainmamba_upernet_shapes", checkpoints=["iter_1.pth", "iter_2.pth"]
    )
    (last.parent / "last_checkpoint").write_text("elsewhere/plainmamba_upernet_shapes/iter_2.pth")
    write_pictures("data/val2017", [f"{i:03}.png" for i in range(50)] + ["readme.txt", "x.tif"])
    site, models, exported = build()
    assert exported == ["best_2.pth", "best_mIoU_iter_600.pth", "iter_2.pth"]
    assert [model["title"] for model in models] == [
        "UperNet on GroupMamba (groupmamba_upernet_shapes)",
        "UperNet on PlainMamba, pruned",
        "UperNet on GroupMamba (plainmamba_upernet_shapes)",
    ]
    for model in models:
        assert "work_dirs" in (site / model["file"]).read_text()
        shown = [(site / example).read_bytes().decode() for example in model["examples"]]
        assert shown == [f"{i:03}.png" for i in (0, 8, 16, 24, 32, 40)]
    assert models[0]["examples"] == models[1]["examples"]
    for path in (p for p in PAGE.iterdir() if p.is_file() and p.suffix != ".py"):
        assert (site / path.name).read_bytes() == path.read_bytes()


def test_exports_again_only_what_has_changed(build, monkeypatch):
    config = write_run("work_dirs/groupmamba_upernet_shapes")
    write_run("work_dirs/plainmamba_upernet_shapes")
    assert len(build()[2]) == 2
    assert build()[2] == []
    torch.save({"other": 1}, config.parent / "best_mIoU_iter_600.pth")
    assert len(build()[2]) == 1
    config.write_text(config.read_text() + "optional = 1\n")
    assert len(build()[2]) == 1
    assert len(build("--cfg-options", "model.test_cfg.mode=whole2")[2]) == 2
    assert len(build()[2]) == 2
    Path("build/web/site/models/plainmamba_upernet_shapes.onnx").unlink()
    assert len(build()[2]) == 1
    shutil.rmtree("work_dirs/plainmamba_upernet_shapes")
    site, models, exported = build()
    assert exported == [] and len(models) == 1
    assert [path.stem for path in (site / "models").iterdir()] == ["groupmamba_upernet_shapes"]


def test_a_model_of_ones_own(build, capsys):
    config = write_run("mine/cells")
    site, models, exported = build(config, "mine/cells/best_mIoU_iter_600.pth")
    assert exported == ["best_mIoU_iter_600.pth"]
    assert [model["file"] for model in models] == ["models/cells.onnx"]
    assert models[0]["examples"] == []
    assert "No example pictures: data/val2017 has none" in capsys.readouterr().out
    write_pictures("data/val2017", ["0001.JPG"])
    (example,) = build(config, "mine/cells/best_mIoU_iter_600.pth")[1][0]["examples"]
    assert example.endswith(".jpg") and (site / example).read_bytes() == b"0001.JPG"
    (Path("data/val2017") / "0001.JPG").write_bytes(b"another")
    (other,) = build(config, "mine/cells/best_mIoU_iter_600.pth")[1][0]["examples"]
    assert other != example and [path.name for path in (site / "examples").iterdir()] == [
        Path(other).name
    ]


def test_what_others_put_into_the_folders_stays(build):
    config = write_run("work_dirs/groupmamba_upernet_shapes")
    write_run("work_dirs/other_shapes")
    for listed in ("[3]", '[{"file": 3, "examples": []}]', "{"):
        site, *_ = build()
        own = [site / "models/own.onnx", site / "examples/own.png"]
        for path in own:
            path.touch()
        (site / "models.json").write_text(listed)
    shutil.rmtree("work_dirs/other_shapes")
    build()  # of which no list is left
    write_pictures("data/val2017", ["0001.png"])
    build(config, config.parent / "best_mIoU_iter_600.pth")
    build()
    assert all(path.exists() for path in own)


def test_addresses_of_any_names(build):
    """With # or ?, which end the path of an address."""
    config = write_run("work_dirs/a#b?_shapes")
    write_pictures("data/val2017", ["a#1.png", "50%?.png"])
    site, (model,), _ = build(config, config.parent / "best_mIoU_iter_600.pth")
    with serving(site) as server:
        answers = [ask(server, f"/{name}") for name in (model["file"], *model["examples"])]
    assert [answer.status for answer, _ in answers] == [200] * 3
    assert sorted(body for _, body in answers[1:]) == [b"50%?.png", b"a#1.png"]


def test_no_demo_model(build):
    write_run("work_dirs/groupmamba_upernet_shapes", checkpoints=[])
    with pytest.raises(
        UserError,
        match="no demo model was trained in work_dirs yet; train one with `make train-seg`",
    ):
        build()
    with pytest.raises(UserError, match="give both a config and a checkpoint"):
        build("config.py")


@pytest.mark.parametrize(
    ("config", "checkpoint", "words"),
    [
        ("missing.py", "there.pth", "there is no config file missing.py"),
        ("there.py", "missing.pth", "cannot read the checkpoint missing.pth: .*No such file"),
        ("broken.py", "there.pth", "cannot read the config broken.py"),
        ("there.pth", None, "there.pth is not a readable PyTorch checkpoint"),
    ],
)
def test_files_that_will_not_do(build, config, checkpoint, words):
    Path("there.py").write_text(DENSE)
    Path("broken.py").write_text("model = (")
    Path("there.pth").write_bytes(b"")
    with pytest.raises(UserError, match=words):
        build(*filter(None, (config, checkpoint)))
    assert not Path("build/web/site/models.json").exists()


def test_without_onnxruntime_web(build):
    config = write_run("work_dirs/groupmamba_upernet_shapes")
    Path("build/web/site/onnxruntime-web").rmdir()
    with pytest.raises(UserError, match="onnxruntime-web does not exist; fetch it with `make web`"):
        build(config, config)


def test_a_taken_port_ends_it_before_the_work(build):
    write_run("work_dirs/groupmamba_upernet_shapes")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        arguments = web_parser().parse_args(["--port", str(port)])
        with pytest.raises(UserError, match=f"port {port} is in use; choose another with PORT="):
            web(arguments, PAGE)
    assert not Path("build/web/site/models").exists()
    with pytest.raises(UserError, match="port 70000 cannot be used"):
        web(web_parser().parse_args(["--port", "70000"]), PAGE)


# ----------------------------------------------------------------------------------------- serving


@contextmanager
def serving(folder):
    with PageServer(folder, 0) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield server
        finally:
            server.stop()
            thread.join()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(PAGE, folder, dirs_exist_ok=True)
    for name in ("a.wasm", "a.mjs", "models/a.onnx", "../secret"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    (folder / "link").symlink_to("../secret")
    (folder / "linked").symlink_to("..")
    os.mkfifo(folder / "fifo")
    with serving(folder) as server:
        yield server


def ask(server, path, host="127.0.0.1:PORT", method="GET", **headers):
    port = int(re.search(r":(\d+)/", server.address)[1])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    if host:
        connection.putheader("Host", host.replace("PORT", str(port)))
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/page.js", "text/javascript; charset=utf-8"),
        ("/style.css", "text/css; charset=utf-8"),
        ("/icon.svg", "image/svg+xml"),
        ("/a.wasm", "application/wasm"),
        ("/a.mjs", "text/javascript; charset=utf-8"),
        ("/models/a.onnx", "application/octet-stream"),
    ],
)
def test_kinds_of_files(server, path, kind):
    answer, body = ask(server, path)
    assert answer.status == 200 and body
    assert answer.headers["Content-Type"] == kind


def test_headers(server):
    answer, _ = ask(server, "/model_worker.js")
    assert answer.headers["Content-Security-Policy"].startswith(POLICY)
    assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_the_page_says_the_same_policy():
    """For servers that do not."""
    found = re.search(
        r'"Content-Security-Policy"\s+content="([^"]+)"', (PAGE / "index.html").read_text()
    )
    assert found[1] == POLICY
    assert "'unsafe" not in POLICY and "http" not in POLICY


def test_a_changed_file_is_asked_for_again(server):
    answer, _ = ask(server, "/models/a.onnx")
    assert answer.headers["Cache-Control"] == "no-cache"
    again, body = ask(server, "/models/a.onnx", If_Modified_Since=answer.headers["Last-Modified"])
    assert again.status == 304 and body == b""


@pytest.mark.parametrize(
    "path",
    [
        "/../secret",
        "/%2e%2e/secret",
        "/models/",
        "/models/../../secret",
        "/link",
        "/linked/secret",
        "/fifo",
        "/%00",
        "/page.js/",
    ],
)
def test_nothing_else_is_served(server, path):
    answer, body = ask(server, path)
    assert answer.status == 404 and b"secret" not in body.lower().replace(b"/secret", b"")


@pytest.mark.parametrize("host", ["evil.example:PORT", "evil.example", "", "127.0.0.1.evil:PORT"])
def test_other_names_of_this_machine_are_refused(server, host):
    assert ask(server, "/", host=host)[0].status == 403


@pytest.mark.parametrize("host", ["localhost:PORT", "127.0.0.1"])
def test_its_own_names_are_not(server, host):
    """Without a number, too, as a browser asks on port 80."""
    assert ask(server, "/", host=host)[0].status == 200


def test_only_reading(server):
    assert ask(server, "/index.html", method="HEAD")[0].status == 200
    assert ask(server, "/index.html", method="POST")[0].status == 501


def test_only_on_this_machine(server):
    assert server.address.startswith("http://127.0.0.1:")
    assert server._server.server_address[0] == "127.0.0.1"


def test_a_connection_that_says_nothing_is_closed(server, monkeypatch):
    monkeypatch.setattr(page_server._Handler, "timeout", 0.1)
    address = server._server.server_address
    with socket.create_connection(address, timeout=10) as connection:
        assert connection.recv(1) == b""


@pytest.mark.parametrize("error", [BrokenPipeError, ZeroDivisionError])
def test_a_browser_that_closes_a_connection_is_no_error(server, capsys, error):
    try:
        raise error
    except Exception:
        server._server.handle_error(None, ("127.0.0.1", 1))
    assert bool(capsys.readouterr().err) is (error is ZeroDivisionError)


def test_ctrl_c_is_the_usual_end(tmp_path, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    with PageServer(tmp_path, 0) as server:
        monkeypatch.setattr(server._server, "serve_forever", interrupted)
        server.serve()


def test_a_model_is_exported_anew_when_the_package_changes_not_when_anything_else_does():
    files = package_sources()
    assert ROOT / "mmvssm" / "run" / "export_onnx.py" in files
    assert {path.relative_to(ROOT).parts[0] for path in files} == {"mmvssm"}

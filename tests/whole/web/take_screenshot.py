"""Take the README's picture of the page that `make web` has built.

PYTHONPATH=.:tests python tests/whole/web/take_screenshot.py build/web/site docs/web.jpg
"""

import argparse
import tempfile
import threading
from pathlib import Path

from page_server import PageServer

from support.browser import Browser


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("site", type=Path, help="folder of the page")
    parser.add_argument("out", type=Path, help="the JPEG file to write")
    parser.add_argument("--model", type=int, default=0, help="which in the page's list")
    parser.add_argument("--example", type=int, default=0, help="which of the example pictures")
    parser.add_argument("--threshold", type=float, default=0.3, help="of a detector's scores")
    parser.add_argument("--size", type=int, nargs=2, default=[1120, 760], help="of the window")
    parser.add_argument("--dark", action="store_true")
    return parser.parse_args()


def main():
    args = parse_args()
    with tempfile.TemporaryDirectory() as profile, PageServer(args.site, 0) as server:
        threading.Thread(target=server.serve).start()
        browser = Browser(profile)
        try:
            with browser.page(server.address, *args.size) as page:
                page.resize(*args.size, dark=args.dark)
                wait(page, "done")
                page.evaluate(
                    f"""{{
                        const models = document.getElementById("model");
                        models.selectedIndex = {args.model};
                        models.dispatchEvent(new Event("change"));
                        document.documentElement.dataset.state = "waiting";
                    }}"""
                )
                wait(page, "done")
                page.evaluate("document.documentElement.dataset.state = 'waiting'")
                page.evaluate(
                    f"document.querySelectorAll('#examples button')[{args.example}].click()"
                )
                wait(page, "done")
                page.evaluate(
                    f"""{{
                        const threshold = document.getElementById("threshold");
                        threshold.value = {args.threshold};
                        threshold.dispatchEvent(new Event("input"));
                    }}"""
                )
                args.out.write_bytes(page.screenshot("jpeg", quality=85))
        finally:
            browser.close()
            server.stop()


def wait(page, state):
    page.wait(f"document.documentElement.dataset.state === '{state}'")


if __name__ == "__main__":
    main()

"""Take the README's picture of the workbench: `make picture`.

A real run of GRPO, opened in `polm app` in a headless Chromium, at the tab *Understand*.
The picture is written to nbs/_site/cockpit.png with at most 200 kB. `--steps` shortens the run.
"""

import argparse
import io
import sys
import tempfile
from pathlib import Path

from browsing import Page, open_browser, patience, voila
from PIL import Image
from playwright.sync_api import sync_playwright

from polm_lab.runner.launch import run

PICTURE = Path(__file__).resolve().parent.parent / "nbs" / "_site" / "cockpit.png"
MOST = 200_000  # bytes


def compressed(png: bytes) -> bytes:
    "The picture with as many colors as fit into `MOST` bytes."
    image = Image.open(io.BytesIO(png)).convert("RGB")
    for colors in (256, 128, 64, 32):
        out = io.BytesIO()
        image.quantize(colors).save(out, "png", optimize=True)
        if out.tell() <= MOST:
            return out.getvalue()
    raise SystemExit(
        f"the picture has {out.tell():,} bytes with 32 colors; expected at most {MOST:,}"
    )


def take(steps: int) -> bytes:
    "A screenshot of the workbench with a finished run."
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        folder = Path(place)
        made = run("grpo", out=folder / "runs", steps=steps)
        browser = open_browser(playwright)
        with voila(folder) as address:
            at = Page(browser, 1400, 1000)
            at.page.goto(f"{address}/?theme=light")
            at.page.get_by_role("tab", name="Watch", exact=True).wait_for(
                timeout=patience(90) * 1000
            )
            at.tab("Understand")
            at.text(made.id, 60)
            at.page.wait_for_timeout(3000)
            png = at.page.screenshot()
            at.context.close()
        browser.close()
    return png


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=PICTURE)
    options = parser.parse_args()
    options.out.write_bytes(compressed(take(options.steps)))
    print(f"{options.out}: {options.out.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The page in a real browser without network: it draws what it should, in the colours it says."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.unit.trace.test_views import boot_like, untold
from vmm.core.output import Output
from vmm.trace.layout import Kind
from vmm.trace.reader import Trace
from vmm.trace.summary import summarise
from vmm.trace.views.page import write_page

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
SHARED, CONVERTING, PRIVATE, MARK = (13, 148, 136), (245, 158, 11), (221, 227, 238), (190, 24, 93)
"""The colours of page.css, light."""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        if os.environ.get("PYVMM_BROWSER_REQUIRED"):
            pytest.fail(f"none of {', '.join(_NAMES)} is installed")
        pytest.skip("no Chromium here: install chromium-headless-shell to run this test")
    return found


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two traces."""
    folder = tmp_path_factory.mktemp("page")
    traces = [Trace(boot_like(seed).write(folder / name)) for seed, name in ((0, "a"), (3, "b"))]
    write_page(
        Output("page", str(folder / "page.html")), traces, [summarise(trace) for trace in traces]
    )
    return folder / "page.html"


def browse(browser: str, html: Path, *options: str) -> str:
    """What the browser prints; it can resolve no name and reach no address but the file."""
    done = subprocess.run(
        [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9",
            f"--user-data-dir={html.parent / 'profile'}", "--window-size=1300,1500",
            *options, html.as_uri(),
        ],
        capture_output=True, text=True, timeout=90, check=True, env={**os.environ, "TZ": "UTC"},
    )  # fmt: skip
    return done.stdout


def test_page_in_a_browser_has_charts_with_content(browser: str, html: Path) -> None:
    dom = browse(browser, html, "--dump-dom")

    charts = Counter(re.findall(r'data-chart="(\w+)"', dom))
    assert charts == {
        "changes": 1, "timeline": 2, "shared": 1, "latency": 1, "io": 1, "exits": 1, "refusals": 1,
    }  # fmt: skip
    # Every change of state is drawn: 48 runs of states, what is left of RAM, 48 conversions.
    assert all(int(drawn) > 96 for drawn in re.findall(r'data-drawn="(\d+)"', dom))
    latency = dom[dom.index('data-chart="latency"') : dom.index('data-chart="io"')]
    assert latency.count("<title>") >= 6
    shared = dom[dom.index('data-chart="shared"') : dom.index('data-chart="latency"')]
    assert "peak 16" in shared
    assert max(len(path) for path in re.findall(r'd="([^"]*)"', shared)) > 300
    assert "1 x share (hypercall): refused by a policy, EACCES" in dom


def test_page_of_two_runs_begins_with_what_changed_and_has_one_time_scale(
    browser: str, tmp_path: Path
) -> None:
    longer = boot_like()
    longer.facts["policies"] = [["m:Stricter"]]
    for number in range(20):
        longer.request(
            Kind.SHARE, 300 + number, 5, 1, decision="deny", errno=errno.EACCES, by="Stricter"
        )
    folders = [boot_like().write(tmp_path / "a"), longer.write(tmp_path / "b")]
    traces = [Trace(folder) for folder in folders]
    path = tmp_path / "page.html"
    write_page(Output("page", str(path)), traces, [summarise(trace) for trace in traces])

    dom = browse(browser, path, "--dump-dom")

    text = re.sub(r"<[^>]*>", " ", dom[dom.index("What changed") : dom.index('class="tiles"')])
    words = " ".join(text.split())
    assert re.search(r"policies none m:Stricter .*refused by a policy 1 21 21x", words)
    windows = re.findall(r'data-window="([^"]*)"', dom)
    assert len(windows) == 2 and len(set(windows)) == 1
    assert windows[0].startswith("0,319")
    assert re.findall(r'data-tracks="([^"]*)"', dom) == ["allow,deny", "allow,deny"]
    assert re.findall(r'data-decided="([^"]*)"', dom) == ["49", "69"]


def test_page_in_a_browser_shows_states_in_their_colours(browser: str, html: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow comes with the extra `plots`")
    picture = html.parent / "page.png"

    browse(browser, html, f"--screenshot={picture}")

    with image.open(picture) as opened:
        rgb = opened.convert("RGB")
        pixels = Counter({colour: count for count, colour in rgb.getcolors(rgb.width * rgb.height)})
    # The bounce buffer is shared for 7/8 of the time: 16 of 512 MiB, twice.
    assert pixels[PRIVATE] > 300_000
    assert 10_000 < pixels[SHARED] < 100_000
    assert pixels[CONVERTING] > 400  # the legend alone has some 250
    assert pixels[MARK] > 500


def test_page_of_a_run_without_news_of_shares_says_so_and_shows_no_zero(
    browser: str, tmp_path: Path
) -> None:
    trace = Trace(untold().write(tmp_path / "t"))
    path = tmp_path / "page.html"
    write_page(Output("page", str(path)), [trace], [summarise(trace)])

    dom = browse(browser, path, "--dump-dom")

    tiles = {label: value for value, label in re.findall(r"<b>(.*?)</b><span>(.*?)<", dom)}
    for label in ("share and unshare requests", "shared at most", "spent converting"):
        assert tiles[label] == "not told"
    shared = dom[dom.index('data-chart="shared"') : dom.index('data-chart="latency"')]
    assert "without telling the host" in dom and "peak" not in shared
    assert 'data-chart="exits"' in dom

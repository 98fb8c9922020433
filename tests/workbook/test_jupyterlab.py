"""A reader's way: JupyterLab in a real browser, the quickstart opened, all its cells run, its figures seen."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest

from flexq_core.workbook import paths

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: make env")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium or no chromedriver: apt install chromium-driver"),
]
QUICKSTART = "00_quickstart.ipynb"
CONTROL = "\ue009"  # of WebDriver


def eventually(condition: Callable[[], Any], *, seconds: float, told: Callable[[], str]) -> Any:
    """What the condition returns as soon as that is true; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (met := condition()):
        assert time.monotonic() < deadline, told()
        time.sleep(0.2)
    return met


@pytest.fixture
def folder(tmp_path):
    """Copies of the notebooks beside the package, as in a checkout; what is run and saved here leaves the checkout alone."""
    shutil.copytree(paths.NOTEBOOKS, tmp_path / "notebooks", ignore=shutil.ignore_patterns(".*"))
    (tmp_path / "flexq_core").symlink_to(paths.ROOT / "flexq_core")
    notebook = tmp_path / "notebooks" / QUICKSTART
    source = notebook.read_text(encoding="utf-8")
    fewer = source.replace("new_tokens: int = 80 ", "new_tokens: int = 8 ")  # most of the time is writing them
    assert fewer != source
    notebook.write_text(fewer, encoding="utf-8")
    return tmp_path


@pytest.fixture
def lab(folder):
    """JupyterLab as `make lab` starts it, on the copies, without the user's settings; yields the quickstart's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: str(folder / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    environment = os.environ | environment | {"FLEXQ_OUTPUTS": str(folder / "outputs")}
    command = [sys.executable, "-m", "jupyterlab", str(folder / "notebooks"), "--no-browser", "--allow-root"]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with (folder / "lab.log").open("w+") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            facts = folder / "JUPYTER_RUNTIME_DIR" / f"jpserver-{server.pid}.json"
            eventually(facts.is_file, seconds=60, told=(folder / "lab.log").read_text)
            known = json.loads(facts.read_text())
            yield f"{known['url']}lab/tree/{QUICKSTART}?token={known['token']}"
        finally:
            server.terminate()  # ends its kernels as well
            server.wait(30)


@pytest.fixture
def browser(folder):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "headless=new",
        "disable-dev-shm-usage",
        "window-size=1280,4000",
        f"user-data-dir={folder}/browser",
    ):
        options.add_argument(f"--{argument}")
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium refuses root one
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def test_the_quickstart_runs_in_jupyterlab_and_its_figures_are_seen(folder, lab, browser):
    notebook = folder / "notebooks" / QUICKSTART

    def all_of(selector: str) -> list:
        return browser.find_elements("css selector", selector)

    def texts(selector: str) -> list[str]:
        """In one call: JupyterLab may put another element in an element's place between two."""
        script = "return [...document.querySelectorAll(arguments[0])].map(element => element.textContent)"
        return browser.execute_script(script, selector)

    def prompts() -> list[str]:
        """Of the code cells: empty, `*` while a cell waits or runs, then its number."""
        return [text.strip("[]: ") for text in texts(".jp-CodeCell .jp-InputPrompt")]

    def seen() -> str:
        return f"{prompts()} {texts('.jp-Dialog, .jp-OutputArea-output')}"

    def in_file() -> list[dict]:
        """The code cells as they have been saved; none while they are being saved."""
        try:
            cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        except json.JSONDecodeError:
            return []
        return [cell for cell in cells if cell["cell_type"] == "code"]

    def idle() -> bool:
        return bool(all_of(".jp-Notebook-ExecutionIndicator[data-status=idle]")) and len(prompts()) == len(code)

    def started() -> bool:
        next(item for item in all_of(".lm-MenuBar-item") if item.text == "Run").click()
        eventually(lambda: all_of("[data-command='runmenu:run-all']"), seconds=10, told=seen)[0].click()
        time.sleep(1)
        return any(prompts())

    code = ["".join(cell["source"]) for cell in in_file()]
    browser.get(lab)
    eventually(idle, seconds=60, told=seen)
    eventually(started, seconds=60, told=seen)  # JupyterLab says "idle", and drops what it is told, before it is ready
    eventually(lambda: idle() and "*" not in prompts(), seconds=180, told=seen)
    webdriver.ActionChains(browser).key_down(CONTROL).send_keys("s").key_up(CONTROL).perform()
    ran = [prompt for prompt in prompts() if prompt]
    eventually(lambda: [str(c["execution_count"]) for c in in_file()][: len(ran)] == ran, seconds=30, told=seen)

    outputs = [output for cell in in_file() for output in cell["outputs"]]
    assert [output["evalue"] for output in outputs if output["output_type"] == "error"] == []
    assert len(ran) == len(code), seen()
    figures = all_of(".jp-OutputArea-output img")
    assert len(figures) == sum("run.figure(" in source for source in code) > 0
    assert all(int(figure.get_attribute("naturalWidth")) > 100 and figure.is_displayed() for figure in figures)
    assert all_of(".jp-OutputArea-output .jupyter-widgets.widget-hprogress"), "no progress bar, but its text perhaps"
    claims = texts(".jp-OutputArea-output")[-1].strip().splitlines()
    assert len(claims) > 1 and all(claim.startswith("holds") for claim in claims), claims

"A reader opens a notebook in JupyterLab, in a real browser, and runs all of it: nothing fails, and everything is to be seen."

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from agrivision_repro.runs.run import plan_run
from agrivision_repro.runs.workspace import Workspace

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ["nbs/index.ipynb", "nbs/20_norms.ipynb", "nbs/tables/table1_modality.ipynb"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
LACKING = [name for name in ("jupyterlab", "selenium") if not find_spec(name)]
LACKING += [name for name, path in {"chromium": CHROMIUM, "chromedriver": DRIVER}.items() if not path]
pytestmark = [pytest.mark.lab, pytest.mark.skipif(bool(LACKING), reason=f"no {', '.join(LACKING)} here")]

# no question about news, and every cell in the page however far down it is
SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
}
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--no-proxy-server"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1300,1600"]
LOOK = """
const all = selector => [...document.querySelectorAll(selector)], text = e => e.textContent.trim()
const stream = kind => all(`.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.${kind}"]`).map(text)
return {
    idle: all('.jp-Notebook-ExecutionIndicator[data-status=idle]').length > 0 && all('.jp-Toolbar-kernelName').map(text)[0] != 'No Kernel',
    numbers: all('.jp-CodeCell .jp-InputPrompt').map(text),
    errors: [...stream('error'), ...stream('stderr').filter(words => /Traceback|Warning/.test(words))],
    dialogs: all('.jp-Dialog').map(text),
    pictures: all('.jp-OutputArea-output img, .jp-MarkdownOutput img').map(e => e.naturalWidth),
    widgets: all('.jupyter-widgets-view').map(text).filter(words => /Error|Loading/.test(words)),
    equations: all('.jp-MarkdownCell').filter(e => e.querySelector('mjx-container')).length,
    misprints: all('mjx-merror').map(text),
}"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[tuple[Path, dict]]:
    "JupyterLab on a copy of the notebooks without their outputs: its folder, and what it says of itself."
    home = tmp_path_factory.mktemp("home")
    root = home / "checkout"
    for folder in ("nbs", "results"):
        shutil.copytree(ROOT / folder, root / folder)
    for name in NOTEBOOKS:
        write_notebook(root / name, read_cells(name))
    (home / "config" / "labconfig").mkdir(parents=True)
    (home / "config" / "labconfig" / "default_setting_overrides.json").write_text(json.dumps(SETTINGS))
    folders = {"HOME": "", "JUPYTER_CONFIG_DIR": "config", "JUPYTER_RUNTIME_DIR": "run", "JUPYTERLAB_SETTINGS_DIR": "settings"}
    folders |= {"JUPYTERLAB_WORKSPACES_DIR": "workspaces", "IPYTHONDIR": "ipython", "AGRIVISION_OUT": "out"}
    words = ["--no-browser", "--ip=127.0.0.1", "--port=0", "--allow-root", f"--ServerApp.root_dir={root}"]
    words.append(f"--IdentityProvider.token={secrets.token_hex(16)}")
    environment = os.environ | {name: str(home / folder) for name, folder in folders.items()}
    with open(home / "lab.log", "w") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *words], env=environment, stdout=log, stderr=log, cwd=root)
    try:
        yield root, wait_for_server(server, home)
    finally:
        stop(server)


def wait_for_server(server: subprocess.Popen, home: Path) -> dict:
    "What JupyterLab writes of itself once it listens."
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        for path in (home / "run").glob("jpserver-*.json"):
            if path.read_text().endswith("}"):
                return json.loads(path.read_text())
        time.sleep(0.1)
    pytest.fail((home / "lab.log").read_text())


def stop(server: subprocess.Popen) -> None:
    "Let it end its kernels, and end it if it does not go."
    server.terminate()
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator:
    "Chromium without a window, which writes down what it asks the network for."
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    driver = webdriver.Chrome(service=webdriver.ChromeService(DRIVER), options=options)
    try:
        yield driver
    finally:
        driver.quit()


def read_cells(name: str) -> list:
    return nbformat.read(ROOT / name, as_version=4).cells


def write_notebook(path: Path, cells: list) -> None:
    "Without outputs, so that whatever is seen was made by this run."
    for cell in cells:
        if cell.cell_type == "code":
            cell.outputs = []
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


def run_all(browser, server: dict, name: str, cells: list) -> list[str]:
    "Open a notebook and run all cells by the menu: what is amiss once all ran, one failed, something is asked, or in five minutes."
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(f"{server['url']}lab/tree/{name}?token={server['token']}&reset")
    wait = WebDriverWait(browser, 60)
    wait.until(lambda _: browser.execute_script(LOOK)["idle"])
    browser.find_element(By.XPATH, "//*[@id='jp-MainMenu']//*[text()='Run']").click()
    wait.until(lambda _: browser.find_elements(By.CSS_SELECTOR, "[data-command='runmenu:run-all']"))[0].click()
    deadline = time.monotonic() + 300
    while True:
        seen = browser.execute_script(LOOK)
        faults = find_faults(seen, cells)
        if not faults or seen["dialogs"] or (seen["errors"] and seen["idle"]) or time.monotonic() > deadline:
            return faults
        time.sleep(0.5)


def find_faults(seen: dict, cells: list) -> list[str]:
    "What the page lacks of the saved notebook's cells and outputs, and what it has too much."
    code = [cell for cell in cells if cell.cell_type == "code"]
    prose = [cell.source for cell in cells if cell.cell_type == "markdown"]
    ran = sum(bool(re.fullmatch(r"\[\d+\]:", number)) for number in seen["numbers"])
    saved = [sum("image/png" in output.get("data", {}) for output in cell.outputs) for cell in code]
    drawn = [cell.source.count("save_picture(") for cell in code]  # table notebooks are saved without outputs
    pictures = sum(map(max, saved, drawn)) + "".join(prose).count("![")
    equations = sum("$" in re.sub(r"`[^`]*`", "", source) for source in prose)
    faults = [] if seen["idle"] else ["the kernel is busy"]
    faults += [f"{kind}: {words}" for kind in ("errors", "dialogs", "widgets", "misprints") for words in seen[kind]]
    faults += [f"{ran} of {len(code)} cells ran"] if (ran, len(seen["numbers"])) != (len(code), len(code)) else []
    shown = sum(width > 0 for width in seen["pictures"])
    faults += [f"{shown} of {pictures} pictures"] if (shown, len(seen["pictures"])) != (pictures, pictures) else []
    faults += [f"equations in {seen['equations']} of {equations} cells"] if seen["equations"] != equations else []
    return faults


def find_hosts(browser) -> set[str]:
    "The hosts that pages have asked for anything since the last call; `data:`, `blob:` and `chrome:` stay in the browser."
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return {urlsplit(url).hostname for url in urls if urlsplit(url).scheme.startswith("http")}


def photograph(browser, path: Path) -> Image.Image:
    "The part of the notebook that holds its last picture, without JupyterLab around it."
    from selenium.webdriver.common.by import By

    browser.execute_script("[...document.querySelectorAll('.jp-Notebook img')].at(-1).scrollIntoView({block: 'center'})")
    browser.find_element(By.CSS_SELECTOR, ".jp-NotebookPanel-notebook").screenshot(str(path))
    return Image.open(path).convert("RGB")


def is_blank(picture: Image.Image) -> bool:
    "Fewer than 100 colours, or under 5 % of the pixels off the commonest one."
    counts = [count for count, _ in picture.getcolors(picture.width * picture.height)]
    return len(counts) < 100 or max(counts) > 0.95 * sum(counts)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs_in_jupyterlab(name, lab, browser, tmp_path):
    _, server = lab
    assert run_all(browser, server, name, read_cells(name)) == []
    assert find_hosts(browser) == {"127.0.0.1"}
    assert not is_blank(photograph(browser, tmp_path / "page.png"))


def test_another_tile_is_another_picture(lab, browser, tmp_path):
    "The page that explores finished runs: two of them in a folder of its own, and the next tile by an arrow key."
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    root, server = lab
    workspace = Workspace(tmp_path / "runs", device="cpu", precision="float32")
    rgb, _ = workspace.results([plan_run("smoke", "synthetic", channels=c, depth=18) for c in ("rgb", "nir3")])
    cells = read_cells("nbs/explore.ipynb")
    cells[1].source = cells[1].source.replace('out: str = ""', f"out: str = {str(workspace.out)!r}")
    write_notebook(root / "nbs" / "explore.ipynb", cells)
    cells[-1].outputs = [new_output("display_data", {"image/png": ""})] * 2  # the tile and the divergence, inside of widgets
    assert run_all(browser, server, "nbs/explore.ipynb", cells) == []
    assert not is_blank(photograph(browser, tmp_path / "page.png"))

    def see() -> tuple[str, list[str]]:
        "The tile that is named above its picture, and the pictures."
        return browser.execute_script("""return [
            [...document.querySelectorAll('[data-mime-type="application/vnd.jupyter.stdout"]')].at(-1).textContent.trim(),
            [...document.querySelectorAll('.jp-Notebook .jp-OutputArea-output img')].map(e => e.src)]""")

    names = workspace.open(rgb.run.source, "val").names
    first, (tile, divergence) = see()
    browser.find_element(By.CSS_SELECTOR, ".noUi-handle").send_keys(Keys.ARROW_RIGHT)
    WebDriverWait(browser, 60).until(lambda _: len(see()[1]) == 2 and see()[1][0] != tile)
    assert [first, see()[0]] == names[:2] and see()[1][1] == divergence
    assert find_hosts(browser) == {"127.0.0.1"}


def test_failures_are_seen(lab, browser):
    root, server = lab
    cells = [new_markdown_cell("$x^2$ and ![nothing](nowhere.png)"), new_code_cell("1 / 0"), new_code_cell("2")]
    write_notebook(root / "fails.ipynb", cells)
    error, *others = run_all(browser, server, "fails.ipynb", cells)
    assert error.startswith("errors: ") and "ZeroDivisionError: division by zero" in error
    assert others[-1] == "0 of 1 pictures"  # whether the kernel still runs what was sent before the error is a race of JupyterLab
    nothing = dict.fromkeys(("errors", "dialogs", "widgets", "misprints"), [])
    seen = nothing | {"idle": True, "numbers": ["[1]:", "[ ]:"], "pictures": [0], "equations": 1}
    assert find_faults(seen, cells) == ["1 of 2 cells ran", "0 of 1 pictures"]
    assert is_blank(Image.new("RGB", (1300, 1600), "white"))

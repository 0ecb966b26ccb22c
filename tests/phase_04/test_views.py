"""The views of the ES module, each alone in a page: what they paint is what they follow."""

from pathlib import Path

import pytest

from anomaly_detection.living_report import report_data, static_text
from tests.browser import open_page
from tests.phase_04.test_living_report import invented

pytestmark = pytest.mark.xdist_group("lab")

EXPORT = "\nwindow.module = { Store, viewer, board, gallery, report };"
# The names that a view reads and does not listen to. It gets a state of its own, so that nobody
# else's listeners count.
UNHEARD = """
async ([name, level, data]) => {
  const frame = () => new Promise((done) => requestAnimationFrame(done));
  const shown = module.report(document.createElement("div"), data);
  while (!shown.get("item").map) await frame();
  const reads = new Set();
  class Recorder extends module.Store {
    get(name) { reads.add(name); return super.get(name); }
  }
  const state = new Recorder({ ...shown.values, level });
  module[name](document.body.appendChild(document.createElement("div")), state);
  await frame();
  await frame();
  return [...reads].filter((read) => !state.listeners.has(`change:${read}`));
}
"""


@pytest.mark.parametrize(
    ("view", "level"),
    [("viewer", "image"), ("board", "image"), ("board", "pixel"), ("gallery", "image")],
)
def test_a_view_follows_every_name_that_it_paints(view: str, level: str, tmp_path: Path):
    data = report_data(invented(tmp_path, 12, 32), images=12)
    with open_page() as (page, _):
        page.set_content("<body></body>")
        page.add_script_tag(content=static_text("dashboard.js") + EXPORT, type="module")
        page.wait_for_function("() => window.module")
        assert page.evaluate(UNHEARD, [view, level, data]) == []

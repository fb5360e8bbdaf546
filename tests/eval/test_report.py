import re
from html.parser import HTMLParser

import pytest

from cladapt.errors import DataError
from cladapt.eval.report import (
    Curves,
    HeatMap,
    KeyValues,
    Section,
    Series,
    Table,
    Trace,
    Traces,
    render_report,
)
from cladapt.eval.significance import Effect

EFFECT = Effect(0.0312, 0.0284, 0.0341, 4031)
VOID = {"meta"}


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that every element is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open[-1] != "style":
            self.text.append(data.strip())


def read(*sections: Section, title: str = "Report") -> Reader:
    reader = Reader()
    reader.feed(render_report(title, sections))
    reader.close()
    assert reader.open == []
    return reader


FULL: tuple[Section, ...] = (
    Table("Methods", ["method", "HR@10", "users"], [["peso", EFFECT, 4031], ["markov", 0.0, None]], note="95 %"),
    HeatMap("R[t][s]", [1, 2], [1, 2, 3], [[0.5, 0.2, None], [0.4, 0.3, float("nan")]], corner="after"),
    Curves("Per block", [2, 3, 4], [Series("peso", [EFFECT, 0.04, None]), Series("frozen", [0.01, None, 0.02])]),
    Traces("Steps", [Trace("loss", [[(1, 3.0), (2, 2.5)], [(3, 2.8)]], {1: "block 2", 3: "block 3"})]),
    KeyValues("Provenance", {"data": "abc", "packages": {"torch": "2.13"}, "seeds": [0, 1]}),
)


def test_a_full_report_is_well_formed_and_shows_every_number():
    text = " ".join(read(*FULL).text)
    for expected in (
        "0.0312",
        "[0.0284, 0.0341]",
        "4031",
        "0.0000",
        "0.5000",
        "95 %",
        "packages.torch",
        "2.13",
        "[0, 1]",
    ):
        assert expected in text
    for title in ("Methods", "R[t][s]", "Per block", "Provenance"):
        assert title in text


@pytest.mark.parametrize(
    ("value", "shown"),
    [(-9e-18, "0.0000"), (-0.0, "0.0000"), (9e-18, "0.0000"), (-2e-5, "-2e-05"), (1e-3, "0.0010"), (1.5e5, "1.5e+05")],
)
def test_what_rounding_leaves_of_a_zero_is_one(value: float, shown: str):
    for section in (Table("t", ["x"], [[value]]), HeatMap("t", [1], [2], [[value]])):
        assert shown in read(section).text
    assert f"{shown} [{shown}, {shown}]" in " ".join(
        " ".join(read(Table("t", ["x"], [[Effect(value, value, value, 3)]])).text).split()
    )


def test_the_file_stands_alone():
    html = render_report("Report", FULL)
    assert not re.search(r"https?:|<script|<link|<img|@import|url\(", html)
    assert "prefers-color-scheme:dark" in html


@pytest.mark.parametrize(
    "section",
    [
        Table("<b>&'\"", ["<b>&'\""], [["<b>&'\""]], note="<b>&'\""),
        HeatMap("<b>&'\"", ["<b>&'\""], ["<b>&'\""], [[1.0]], corner="<b>&'\"", note="<b>&'\""),
        Curves("<b>&'\"", ["<b>&'\""], [Series("<b>&'\"", [1.0])], "<b>&'\"", "<b>&'\"", note="<b>&'\""),
        Traces("<b>&'\"", [Trace("<b>&'\"", [[(1, 1.0)]], {1: "<b>&'\""})], "<b>&'\"", note="<b>&'\""),
        KeyValues("<b>&'\"", {"<b>&'\"": "<b>&'\"", "list": ["<b>&'\""]}, note="<b>&'\""),
    ],
    ids=lambda section: type(section).__name__,
)
def test_every_text_is_escaped(section: Section):
    reader = read(section, title="<b>&'\"")
    assert "b" not in {tag for tag, _ in reader.tags}
    assert reader.text.count("<b>&'\"") >= 5  # title twice, heading, note, and at least one more


def test_a_logarithmic_trace_is_drawn_to_scale_and_its_lines_are_named():
    lines = [[(1, 100.0), (2, 10.0), (3, 0.1)], [(1, 1.0)], []]
    reader = read(Traces("t", [Trace("values", lines, labels=["q_proj", "<v>", "none"], log=True)]))
    paths = [re.findall(r"[\d.]+", a["d"] or "") for tag, a in reader.tags if tag == "path"]
    (_, y100, _, y10, _, y01), (_, y1) = (map(float, path) for path in paths)
    assert y01 - y10 == pytest.approx(2 * (y10 - y100), abs=0.2)
    assert y1 - y10 == pytest.approx(y10 - y100, abs=0.2)
    assert {"q_proj", "<v>"} <= set(reader.text)
    with pytest.raises(DataError, match=r"trace 'a' has y=0 on a logarithmic scale"):
        Trace("a", [[(1, 0.0)]], log=True)
    with pytest.raises(DataError, match="trace 'a' has 2 labels for 1 lines"):
        Trace("a", [[(1, 1.0)]], labels=["x", "y"])


@pytest.mark.parametrize(
    "section",
    [
        Table("Empty", ["a"], []),
        HeatMap("Empty", [], [], []),
        HeatMap("Empty", [1], [], [[]]),
        Curves("Empty", [], []),
        Curves("Empty", [2], [Series("a", [None])]),
        Traces("Empty", []),
        Traces("Empty", [Trace("a", [[], []])]),
        KeyValues("Empty", {}),
    ],
)
def test_a_section_without_data_says_so(section: Section):
    assert "Nothing to show." in read(section).text


def test_a_report_without_sections_is_a_page():
    assert read(title="Nothing").text == ["Nothing", "Nothing"]


def test_absent_values_are_dashes():
    text = read(Table("t", ["a", "b", "c"], [[None, float("nan"), 3]])).text
    assert text[-3:] == ["—", "—", "3"]


def test_the_heat_map_is_darkest_at_its_greatest_value_and_frames_the_diagonal():
    cells = [a for tag, a in read(HeatMap("R", [1, 2], [1, 2], [[0.1, 0.2], [None, 0.4]])).tags if tag == "td"]
    shades = [re.search(r"/ ([\d.]+)\)", a["style"] or "") if "style" in a else None for a in cells]
    strength = [float(s[1]) if s else None for s in shades]
    assert strength == [0.06, 0.24, None, 0.6]
    assert [a["class"] for a in cells] == ["n d", "n", "n", "n d"]


def test_a_constant_heat_map_has_one_shade():
    html = render_report("r", [HeatMap("R", [1], [1, 2], [[0.2, 0.2]])])
    assert html.count("rgb(59 130 246 / 0.06)") == 2


def test_points_are_drawn_at_the_height_of_their_value():
    chart = Curves("c", [2, 3, 4], [Series("a", [0.1, 0.2, 0.3])])
    circles = [a for tag, a in read(chart).tags if tag == "circle"]
    x, y = ([float(c[name] or "") for c in circles] for name in ("cx", "cy"))
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2)
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2)
    assert y[0] > y[2]


def test_a_gap_breaks_the_line_and_an_interval_is_a_bar():
    tags = read(Curves("c", [2, 3, 4, 5], [Series("a", [EFFECT, 0.2, None, 0.3])])).tags
    line, *bars = [a for tag, a in tags if tag == "path"]
    assert (line["d"] or "").count("M") == 2
    assert [bar["class"] for bar in bars] == ["bar"]


def test_a_line_without_points_is_left_out_and_keeps_its_colour() -> None:
    lines = [Series("a", [0.1]), Series("counts", [None]), Series("b", [0.2])]
    tags = read(Curves("c", [2], lines)).tags
    assert [a["class"] for tag, a in tags if tag == "li"] == ["c0", "c2"]


@pytest.mark.parametrize("values", [[0.0, 0.0], [-3.2, -3.1], [1e-7, 2e-7], [5e6, -5e6]])
def test_every_point_lies_inside_the_drawing(values: list[float]):
    tags = read(Curves("c", [2, 3], [Series(str(i), values) for i in range(9)])).tags
    circles = [a for tag, a in tags if tag == "circle"]
    assert len(circles) == 18
    assert all(14 <= float(c["cy"] or "") <= 224.1 and 62 <= float(c["cx"] or "") <= 668 for c in circles)


def test_uneven_data_is_refused():
    with pytest.raises(DataError, match="table 't' has a row of 1 cells under 2 columns"):
        Table("t", ["a", "b"], [["x"]])
    with pytest.raises(DataError, match=r"heat map 'h' has rows of \[2\] values for 1 row labels and 3 column labels"):
        HeatMap("h", [1], [1, 2, 3], [[0.1, 0.2]])
    with pytest.raises(DataError, match="curve 'a' of 'c' has 1 points for 2 labels"):
        Curves("c", [1, 2], [Series("a", [0.1])])


def test_struck_cells_of_a_heat_map_are_struck_through():
    html = render_report("r", [HeatMap("R", [1, 2], [1, 2], [[0.1, 0.2], [0.3, 0.4]], struck={(2, 1)})])
    assert re.findall("<s>(.*?)</s>", html) == ["0.3000"]


def test_a_trace_is_drawn_to_scale_and_broken_between_its_lines():
    tags = read(Traces("t", [Trace("loss", [[(1, 0.0), (2, 1.0)], [(5, 0.5)]], {1: "block 2", 5: "block 3"})])).tags
    paths = [re.findall(r"[\d.]+", a["d"] or "") for tag, a in tags if tag == "path"]
    (x1, y1, x2, y2), (x5, y5) = (map(float, path) for path in paths)
    assert x2 - x1 == pytest.approx((x5 - x1) / 4, abs=0.1)
    assert y5 == pytest.approx((y1 + y2) / 2, abs=0.1)
    assert y1 > y2
    rules = [float(a["x1"] or "") for tag, a in tags if tag == "line" and a.get("class") == "mark"]
    assert rules == [x1, x5]

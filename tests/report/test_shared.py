"""What all reports share: JSON lines, mean and error, tables and pages, the style of figures."""

import io
import math

import numpy as np
import pandas as pd
import pytest
from markupsafe import Markup
from PIL import Image
from report_support import outline, sample

from abc_plugin.errors import UserError
from abc_plugin.jsonl import read_jsonl
from abc_plugin.report import html_templates, plots
from abc_plugin.report.statistics import mean_and_error, t_interval, with_error

EVIL = "<script>x</script>\"'&\u202e"


def test_json_lines_come_with_where_they_stand(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"a": "\u2028"}\r\n\n{"a": NaN}\n{"a": "é'.encode()[:-1])  # cut inside a letter
    cut = []
    (first, one), (second, two) = read_jsonl(path, "write it again", cut=cut)
    assert (first, one, second, cut) == (f"{path}:1", {"a": "\u2028"}, f"{path}:3", [f"{path}:4"])
    assert math.isnan(two["a"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a', r"x\.jsonl:2: not JSON \(.*\); write it again"),
        (b'{"a": 1, "b": 2, "a": 3}', r"x\.jsonl:1: not JSON \(the key 'a' is there twice\); write it again"),
        (b"[" * 200_000, r"x\.jsonl:1: not JSON \(.*recursion.*\); write it again"),
        (b"[1]", r"x\.jsonl:1: not an object but list; write it again"),
        (b"\xff\xfe\x00", r"x\.jsonl:1: not UTF-8 text .*; write it again"),
        (None, r"cannot read .*x\.jsonl: No such file or directory; write it again"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_jsonl(tmp_path / "x.jsonl", "write it again")
    assert "\n" not in str(error.value)


def test_mean_and_error_by_hand():
    # 1, 2, 3, 6: mean 3, squares 4 + 1 + 0 + 9 = 14, variance 14 / 3, error sqrt(14 / 3 / 4)
    assert mean_and_error([1.0, 2.0, 3.0, 6.0]) == pytest.approx((3.0, math.sqrt(14 / 12)))
    assert mean_and_error([2.0]) == (2.0, None)
    # 1, 2, 3: s = 1, t_2 = 4.302653
    half = 4.302653 / math.sqrt(3)
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.0 - half, 2.0 + half), abs=1e-5)
    assert t_interval([2.0]) == (2.0, None, None)
    assert (with_error([1.0, 2.0, 3.0, 6.0]), with_error([2.0])) == ("3.00 ± 1.08", "2.00")


def test_pages_and_tables_escape_what_is_not_markup():
    frame = pd.DataFrame({"name": [EVIL], EVIL: [0.5]})
    tokens = html_templates.tokens.completion(sample(EVIL, [EVIL, "b"])) + html_templates.tokens.legend(True)
    body = Markup("<p>ours</p>") + html_templates.table(frame) + tokens
    page = html_templates.document(EVIL, EVIL, body, EVIL)
    parsed = outline(page)
    assert "script" not in parsed.tags and parsed.requests == [] and "://" not in page and "\u202e" not in page
    assert "<p>ours</p>" in page and '<td class="number">0.5</td>' in page
    assert page.count("&lt;script&gt;x&lt;/script&gt;&#34;&#39;&amp;\\u202e") == 7  # title, h1, footer, 2 x 2


def test_tokens_stand_without_space_between():
    spans = html_templates.tokens.completion(sample(tokens=["a", " b\n"], credit=[-0.25, 0.75]))
    assert spans.startswith('<span class="t neg" style="--c:0.2000" data-tip="“a” · credit -25.0 %')
    assert "</span><span" in spans and spans.endswith("> b↵\n</span>")
    assert html_templates.tokens.completion(sample(tokens=[], credit=[])) == '<span class="muted">(no tokens)</span>'


def test_figures_have_one_style():
    looks = plots.looks([*"abcdefgh", "random", "i"], grey=["random"])
    assert looks["a"].colour == "#0072B2" and looks["random"].colour == plots.GREY
    assert looks["i"].line != looks["a"].line and looks["i"].colour == looks["a"].colour
    with plots.style(dark=True) as theme:
        figure, axes = plots.panels(3, columns=2)
        axes[1].plot([0, 1], label="$\\frac$")
        plots.band(axes[1], [0, 1], [0, 0], [1, 1], looks["a"])
        plots.interval(axes[2], 0, 1.0, (0.5, 1.5), looks["a"], filled=False)
        plots.rows(axes[2], ["one"])
        plots.legend(figure)
        png = plots.png(figure, software="me")
    image = Image.open(io.BytesIO(png))
    assert image.info["Software"] == "me" and len(axes) == 3
    assert image.convert("RGB").getpixel((1, 1)) == tuple(bytes.fromhex(theme.background[1:]))
    assert np.allclose(plots.side_by_side([1, 2], 0, 2, 0.1), [0.95, 1.95])

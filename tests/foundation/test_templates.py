"""HTML from templates: values are escaped, unknown names are errors, a template includes its neighbors."""

import jinja2
import pytest
from markupsafe import Markup

from llm2clip_plugin.pages import render


def test_values_are_escaped_and_markup_is_not(tmp_path):
    (tmp_path / "row.html").write_text("<td>{{ text }}</td>\n")
    (tmp_path / "page.html").write_text('{% include "row.html" %}{{ plot }}\n')
    page = render(tmp_path / "page.html", text="<b>red</b> & 'blue'", plot=Markup("<svg/>"))
    assert page == "<td>&lt;b&gt;red&lt;/b&gt; &amp; &#39;blue&#39;</td>\n<svg/>\n"


def test_an_unknown_name_is_an_error(tmp_path):
    (tmp_path / "page.html").write_text("{{ titel }}")
    with pytest.raises(jinja2.UndefinedError, match="'titel' is undefined"):
        render(tmp_path / "page.html", title="x")

"""Names that could become HTML, YAML, Jinja, Markdown or paths, and texts that are merely odd."""

HOSTILE_BY_KIND = {
    "html": [
        *("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "</code></pre><b>", "<!--", "-->"),
        *("a<b>c&amp;d", "<a/b>/<c>", "&#60;script&#62;", "&#x3C;script&#x3E;", "&lt;script&gt;"),
        *("<svg onload=alert(1)>", "<iframe src=//evil>", "<a href='javascript:x'>y</a>"),
        *("<style>*{display:none}</style>", "</table>", "<details open ontoggle=x>", "<!DOCTYPE html>"),
        *("<![CDATA[x]]>", "<?php x ?>", "<SCRIPT/SRC=//evil>", "<\x00script>", "<scr\u200bipt>"),
        *("＜script＞", "'\"><script>", "<base href=//evil>", "<form action=//evil>"),
        *("<meta http-equiv=refresh>", "<object data=x>", "javascript:alert(1)", "data:text/html,<x>"),
    ],
    "yaml": [
        *("a\n---\nlicense: evil", "---", "\n---\n", "a: b", "- a", "x\r\n\r\n# Title"),
        *("!!python/object:os.system", "&a *a", "'\"", "null", "~", "%0a---", "\u2028---\u2028", "|", ">"),
        *("? a", "%YAML 1.2", "...", "{a: b}", "[a, b]", "a #b", "'", '"', "\t", "!!binary x", "<<: *a"),
        *("a:\n  b", "yes", "0x1F", "1e3", ".nan", "2026-01-01", "=", "\ufeff---", "\x85---\x85"),
        *("\rlicense: evil", "---\nlicense: evil\n---", "\u2029license: evil", "language:\n- evil"),
        *("model-index:\n- name: evil",),
    ],
    "jinja": [
        *("{{ 7 * 7 }}", "{% raw %}", "{% include '/etc/passwd' %}", "{# #}", "{{ card_data }}", "${x}"),
        *("}}", "%}", "{%- if x -%}", "{{ ''.__class__.__mro__ }}", "{% endraw %}", "{% set x = 1 %}"),
        *("{% for x in y %}", "{{{x}}}", "<%= x %>", "{{ x|safe }}", "{%\nif\n%}", "${{ x }}", "[[x]]"),
        *("{% autoescape false %}",),
    ],
    "markdown": [
        *("a | b | c", "`code`", "```\nfence", "~~~", "**bold**", "__x__", "_x_", "*", "# heading"),
        *("\n# heading", "[x](javascript:alert(1))", "![x](http://x/y.png)", "[x]: http://x"),
        *("<http://x>", "http://evil", "HTTPS://EVIL", "www.evil.com", "me@evil.com", "@everyone", "#1"),
        *("\\", "\\|", "$\\sum$", "1. x", "1) x", "+ x", "> quote", "    code", "a\n===", "a\n---", "***"),
        *("~~x~~", "[^1]: x", "[a][b]", "ftp://evil", "$$x$$", "\\(x\\)", ":smile:", "- [ ] x", "| --- |"),
        *("\n| a | b |\n|---|---|", "`` ` ``", "x  \ny", "![x](data:image/png;base64,AAAA)"),
        *("[![x](y)](z)", "[x](<y z>)", "//evil.com/x", "evil.com", ":::warning", "{#id .class}"),
    ],
    "text": [
        *("a\x00b\x1b[31m", "\u202egnp.exe", "\x00", "\x07\x08\x0b\x0c", "\x1b]0;title\x07", "\x1b[2J"),
        *("\x7f", "\x9b31m", "\u2066x\u2069", "\u200e\u200f", "\u200d", "\xad", "\u3000", "\U000e0041"),
        *("\ufffe", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "🏴", "é", "Z̡͡a͑", "İıſ", "ﬁ¼𝓍", "٣"),
        *("中文", "עברית", "العربية", "x" * 10000, "\n" * 1000, "<" * 1000, "{" * 1000, "👍" * 500),
        *("a " * 1000,),
    ],
    "paths": [
        *("con.", "x\ny", "a\tb", ".git/config", "user/name.git", "%00", "${HOME}", "!history"),
        *("../../etc/passwd", "..", "/etc/passwd", "~/.ssh/id_rsa", "C:\\x", "\\\\?\\C:"),
        *("file:///etc/passwd", "a/../b", "a//b", "%2e%2e%2f", "CON", "a\x00/b", "-rf", "--help", "$(id)"),
        *("; rm -rf /", "| id", "&& id", "'; DROP TABLE x", "*?", "../" * 100, "hf://x", "a b/c d"),
    ],
}
HOSTILE = [value for values in HOSTILE_BY_KIND.values() for value in values]

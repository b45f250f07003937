"""What attackers of web servers send: paths that lead out, script, foreign hosts and origins, requests in requests."""

from collections.abc import Iterator

# Of files that are there: on the disk, and beside the pages.
_FILES = ("etc/passwd", "proc/self/environ", "proc/self/cmdline", "pyproject.toml", "ml_inference_server/main.py")
_UP = (
    *("../", "..%2f", "%2e%2e/", "%2e%2e%2f", "%252e%252e%252f", "..%252f", "..%5c", "..\\", "%2e%2e%5c", "....//"),
    *("..;/", "%c0%ae%c0%ae/", "%c0%ae%c0%ae%c0%af", "..%c0%af", "%uff0e%uff0e/", "..%00/", ".%2e/", "%2e./", "./../"),
    *(".../...//", "..%ef%bc%8f", "..%e3%80%82/", "%%32%65%%32%65/", "..//", "/..//../"),
)
_BEGINNINGS = ("/", "/v2/models/", "/docs/")


def traversals() -> Iterator[str]:
    """Paths that must lead nowhere."""
    for beginning in _BEGINNINGS:
        for up in _UP:
            for depth, file in ((1, "http_server.py"), (3, _FILES[4]), (8, _FILES[0])):
                yield beginning + up * depth + file
    for file in _FILES:
        yield from (
            f"/{file}",
            f"//{file}",
            f"/./{file}",
            f"/file:///{file}",
            f"/%2f{file}",
            f"/\\{file}",
            f"/~/{file}",
        )
    yield from (
        *("/index.html", "/dashboard/app.js", "/app.js/", "/app.js/..", "/app.js%00", "/app.js%00.html", "/app.js;a"),
        *(
            "/nothing",
            "//",
            "/registry.py",
            "/app.js::$DATA",
            "/APP.JS",
            "/app.js.bak",
            "/app.js~",
            "/.git/config",
            "/.env",
            "/static/app.js",
            "/assets/",
        ),
        *(
            "/__pycache__/",
            "/keys.yaml",
            "/server.key",
            "/C:/Windows/win.ini",
            "/style.css/%2e%2e/app.py",
            "/./.",
            "/*",
        ),
    )


MARKS_OF_FILES = (b"root:", b"import ", b"[project]", b"PATH=", b"-----BEGIN", b"sha256:")
"""In what such files hold."""

SCRIPTS = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "javascript:alert(1)",
    "</script><script>alert(1)</script>",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "{{constructor.constructor('alert(1)')()}}",
    "\u2028alert(1)\u2029",
    "<!--<script>-->",
    "<ScRiPt\x0csrc=//evil.example>",
    "<a href=\x01javascript:alert(1)>a</a>",
    "+ADw-script+AD4-alert(1)+ADw-/script+AD4-",
)
HOSTILE_NAME = '"><img src=x onerror=alert(1)>'

OWN_HOSTS = ("localhost", "LOCALHOST:8080", "localhost.", "127.0.0.1:1", "[::1]:8080", "[::1]")
FOREIGN_HOSTS = (
    *("evil.example", "evil.example:8080", "localhost.evil.example", "evil.example.localhost", "localhost:8080:1"),
    *(
        "localhost:port",
        "user@localhost",
        "localhost@evil.example",
        "[::1]evil",
        "[::1",
        "::1",
        "192.168.1.5",
        "0.0.0.0",
    ),
    *("127.0.0.1.nip.io", "127.1", "2130706433", "0x7f000001", "017700000001", "[::ffff:127.0.0.1]", "localhost/evil"),
    *("localhost#evil", "localhost?evil", "localhost,evil.example", "localhost evil", "localhost\\evil", "*", "", "."),
    *(
        "local\u00e9host",
        "xn--localhost",
        "127.0.0.2",
        "169.254.169.254",
        "localhost..",
        "localhost:",
        "http://localhost",
    ),
)

ALLOWED_ORIGIN = "https://status.example"
FOREIGN_ORIGINS = (
    *(
        "https://evil.example",
        "null",
        "http://localhost",
        "https://status.example.evil.example",
        "http://status.example",
    ),
    *("https://status.example:444", "https://evil.example/https://status.example", "https://STATUS.example", "", "*"),
    *(
        "file://",
        "https://status.example ,https://evil.example",
        "chrome-extension://a",
        "https://status.example\u00e9",
    ),
)
FORM_TYPES = (
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=a",
    "text/plain; application/json",
)
"""What a page of another origin may send without asking first."""

HIDDEN = b"GET /hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"
"""A request that stands in the body of another."""


def smuggled() -> Iterator[tuple[str, bytes]]:
    """(name, a request of which two readers would disagree where it ends, with HIDDEN behind one of the two ends)."""

    def post(*headers: bytes, body: bytes) -> bytes:
        lines = (b"POST /embed HTTP/1.1", b"Host: localhost", b"Content-Type: application/json", *headers)
        return b"\r\n".join(lines) + b"\r\n\r\n" + body

    ended = b"0\r\n\r\n" + HIDDEN
    length = b"Content-Length: %d" % len(ended)
    codings = {
        "chunked": b"Transfer-Encoding: chunked",
        "a blank before the colon": b"Transfer-Encoding : chunked",
        "a tab before the value": b"Transfer-Encoding:\tchunked",
        "a vertical tab": b"Transfer-Encoding:\x0bchunked",
        "capitals": b"TRANSFER-ENCODING: CHUNKED",
        "an x before it": b"Transfer-Encoding: xchunked",
        "a blank before the name": b" Transfer-Encoding: chunked",
        "a line that goes on": b"Transfer-Encoding:\r\n chunked",
        "identity before it": b"Transfer-Encoding: identity, chunked",
        "identity behind it": b"Transfer-Encoding: chunked, identity",
        "twice": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "quotes": b'Transfer-Encoding: "chunked"',
        "a parameter": b"Transfer-Encoding: chunked;q=1",
        "NUL behind it": b"Transfer-Encoding: chunked\0",
        "a comma before it": b"Transfer-Encoding: ,chunked",
        "a line feed alone": b"X: a\nTransfer-Encoding: chunked",
        "a return alone": b"X: a\rTransfer-Encoding: chunked",
        "an underscore": b"Transfer_Encoding: chunked",
        "a dotless i": "Transfer-Encod\u0131ng: chunked".encode(),
        "another one behind it": b"Transfer-Encoding: chunked\r\nTransfer-Encoding: cow",
    }
    for name, coding in codings.items():
        yield f"a length and a coding: {name}", post(length, coding, body=ended)
        yield f"a coding and a length: {name}", post(coding, length, body=ended)
    lengths = {
        "two of them": b"Content-Length: 0\r\nContent-Length: %d",
        "two in one": b"Content-Length: 0, %d",
        "a plus": b"Content-Length: +%d",
        "a minus": b"Content-Length: -%d",
        "hex": b"Content-Length: 0x%d",
        "a blank within": b"Content-Length: 0 %d",
        "an underscore": b"Content-Length: 1_%d",
        "NUL": b"Content-Length: %d\0",
        "a point": b"Content-Length: %d.0",
        "an exponent": b"Content-Length: %de0",
        "quotes": b'Content-Length: "%d"',
        "other digits": "Content-Length: \u0661%d".encode(),
        "a blank before the colon": b"Content-Length : %d",
        "a tab before the name": b"\tContent-Length: %d",
        "20 digits": b"Content-Length: 184467440737095516%d",
        "nothing": b"Content-Length: \r\nContent-Length: %d",
    }
    for name, told in lengths.items():
        yield f"lengths: {name}", post(told % len(HIDDEN), body=HIDDEN)
    sizes = {
        "0x": b"0x0",
        "a minus": b"-0",
        "a plus": b"+0",
        "an underscore": b"0_0",
        "a blank before it": b" 0",
        "NUL behind it": b"0\0",
        "17 digits": b"1" + b"0" * 16,
        "nothing": b"",
        "an extension with a line feed": b"0;a\nb",
        "an extension with a return": b"0;a\rb",
        "a word": b"zero",
        "a point": b"0.0",
    }
    for name, size in sizes.items():
        yield f"chunks: {name}", post(b"Transfer-Encoding: chunked", body=size + b"\r\n\r\n" + HIDDEN)
    ends = {
        "a line feed alone": b"1\n{\n0\n\n",
        "a return alone": b"1\r{\r0\r\r",
        "no end of a chunk": b"1\r\n{0\r\n\r\n",
        "more than the size": b"1\r\n{}\r\n0\r\n\r\n",
    }
    for name, chunk in ends.items():
        yield f"ends of chunks: {name}", post(b"Transfer-Encoding: chunked", body=chunk + HIDDEN)
    version = post(b"Transfer-Encoding: chunked", body=ended).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    yield "chunks in HTTP/1.0", version
    for name, value in {"a return and a line feed": "%0d%0a", "UTF-8 that becomes them": "\u560d\u560a"}.items():
        line = f"GET /v1/models/a{value}X:%20b{value}{value}GET%20/hidden HTTP/1.1\r\nHost: localhost\r\n\r\n"
        yield f"a path with {name}", line.encode()

"""Paths and URIs: a pattern finds the same files on a disk and in an object store, and reading gives the same rows."""

import email.utils
import gzip
import http.server
import itertools
import os
import re
import threading
import time
import urllib.parse
import xml.sax.saxutils

import pyarrow as pa
import pyarrow.parquet
import pytest

from clsd_tf.spec.tables import Column, Table
from pipelines.sources import ROW_ID, list_files, match_files, plan_file, read_slice, resolve_path, size_in_bytes
from pipelines.sources.file_systems import open_file

COLUMNS = (Column(name="user", type="string"), Column(name="item", type="string"))
FILES = (
    "log-1.csv", "log-2.csv", "log-10.csv", "a b%20?.csv", "day=1/x.csv", "day=2/x.csv", "day=2/_SUCCESS",
    "day=2/.x.csv.crc", "day=2/deep/x.csv", "_tmp/day=3/x.csv",
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A folder with ``FILES``, each of two rows, and a link to one of its folders."""
    for name in FILES:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("user,item\nu1,i1\nu2,i2\n")
    (tmp_path / "data" / "latest").symlink_to("day=2")
    (tmp_path / "data" / "nowhere.csv").symlink_to("nothing.csv")
    return tmp_path / "data"


def found(root, pattern):
    """The names below a root that match."""
    return [path.removeprefix(f"{root}/") for path in match_files(f"{root}/{pattern}")]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("log-1.csv", ["log-1.csv"]),
        ("log-3.csv", []),
        ("nothing/*.csv", []),
        ("day=2", []),  # A folder is no file.
        ("log-*.csv", ["log-1.csv", "log-10.csv", "log-2.csv"]),
        ("log-?.csv", ["log-1.csv", "log-2.csv"]),
        ("log-[13].csv", ["log-1.csv"]),
        ("log-[!13-9].csv", ["log-2.csv"]),
        ("log[-1.csv", []),  # No class: what does not close is an ordinary character.
        ("a b%20[?].csv", ["a b%20?.csv"]),
        ("*x.csv", []),
        ("**=1?x.csv", []),
        ("**=1[!a]x.csv", []),
        ("*/x.csv", ["day=1/x.csv", "day=2/x.csv"]),
        ("day=2/*", ["day=2/x.csv"]),
        ("**x.csv", ["day=1/x.csv", "day=2/deep/x.csv", "day=2/x.csv"]),
        ("day=2/**", ["day=2/deep/x.csv", "day=2/x.csv"]),
        ("_tmp/*/x.csv", ["_tmp/day=3/x.csv"]),
    ],
)
def test_a_pattern_finds_its_files_on_a_disk(folder, pattern, names):
    assert found(folder, pattern) == names


def test_paths_hold_from_any_working_directory(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert resolve_path("log-1.csv") == resolve_path("log-1.csv", str(folder)) == f"{folder}/log-1.csv"
    assert resolve_path(f"{folder}/log-1.csv", "elsewhere") == f"{folder}/log-1.csv"
    assert resolve_path("day=*/x.csv", "s3://bucket/log") == "s3://bucket/log/day=*/x.csv"
    assert resolve_path("s3://bucket/log.csv", str(folder)) == "s3://bucket/log.csv"
    assert match_files(resolve_path("log-?.csv")) == [f"{folder}/log-1.csv", f"{folder}/log-2.csv"]


def test_a_malformed_pattern_is_refused(folder):
    with pytest.raises(
        ValueError, match=r"valid glob pattern\. Received: .*log-\[9-1\].* Allowed: \*, \*\*, \?, \[a-c\]"
    ):
        match_files(f"{folder}/log-[9-1].csv")


# --- Object stores ---------------------------------------------------------------------------------------------------


class Store(http.server.BaseHTTPRequestHandler):
    """What reading needs of S3: listing, and ranges of objects. Each folder of ``root`` is a bucket."""

    protocol_version = "HTTP/1.1"
    root = None
    requests = None

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        path, query = urllib.parse.unquote(url.path).strip("/"), dict(urllib.parse.parse_qsl(url.query))
        self.requests.append((self.command, path, self.headers.get("Range")))
        if "secret" in path:
            self._answer(403, b"")
        elif "list-type" in query:
            self._answer(200, self._listing(path, query.get("prefix", ""), query.get("delimiter")))
        elif (self.root / path).is_file():
            content = (self.root / path).read_bytes()
            first, last = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "bytes=0-999999999")).groups()
            part = content[int(first) : int(last) + 1]
            self._answer(206 if "Range" in self.headers else 200, part)
        else:
            self._answer(404, b"")

    def _listing(self, bucket, prefix, delimiter):
        objects = sorted(path for path in (self.root / bucket).rglob("*") if path.is_file())
        sizes = {str(path.relative_to(self.root / bucket)): path.stat().st_size for path in objects}
        keys = [key for key in sizes if key.startswith(prefix)]
        folders = {
            prefix + key.removeprefix(prefix).partition("/")[0] + "/" for key in keys if "/" in key[len(prefix) :]
        }
        if delimiter:
            keys = [key for key in keys if "/" not in key[len(prefix) :]]
        entries = [
            f"<Contents><Key>{xml.sax.saxutils.escape(key)}</Key><Size>{sizes[key]}</Size></Contents>" for key in keys
        ]
        if delimiter:
            entries += [f"<CommonPrefixes><Prefix>{folder}</Prefix></CommonPrefixes>" for folder in sorted(folders)]
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(entries)}</ListBucketResult>".encode()

    def _answer(self, status, content):
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Last-Modified", email.utils.formatdate(0, usegmt=True))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


_BUCKETS = (f"bucket-{number}" for number in itertools.count())


@pytest.fixture
def bucket(folder, monkeypatch):
    """(URI of a bucket with the files of ``folder``, the requests that it has answered)."""
    name = next(_BUCKETS)  # A process connects to a bucket once.
    for link in ("latest", "nowhere.csv"):
        (folder / link).unlink()
    folder.rename(folder.with_name(name))
    handler = type("Handler", (Store,), {"root": folder.parent, "requests": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    _store_at(f"http://127.0.0.1:{server.server_port}", monkeypatch)
    yield f"s3://{name}", handler
    server.shutdown()
    server.server_close()


def _store_at(address, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("log-1.csv", ["log-1.csv"]),
        ("log-3.csv", []),
        ("nothing/*.csv", []),
        ("day=2", []),
        ("log-?.csv", ["log-1.csv", "log-2.csv"]),
        ("a b%20[?].csv", ["a b%20?.csv"]),
        ("*/x.csv", ["day=1/x.csv", "day=2/x.csv"]),
        ("day=2/**", ["day=2/deep/x.csv", "day=2/x.csv"]),
        ("_tmp/*/x.csv", ["_tmp/day=3/x.csv"]),
    ],
)
def test_a_pattern_finds_the_same_files_in_an_object_store(bucket, pattern, names):
    assert found(bucket[0], pattern) == names


def read(table, input_dir):
    """(names of the files, rows with their ids)."""
    files = list_files(table, "log", input_dir)
    batches = [
        batch for file in files for part in plan_file(file, table, 8).slices for batch in read_slice(part, table)
    ]
    assert [batch.unreadable for batch in batches if batch.unreadable] == []
    rows = pa.concat_tables([batch.table for batch in batches if batch.table.num_rows])
    return [(file.name, size_in_bytes(file, table)) for file in files], rows.to_pylist()


@pytest.mark.parametrize(("file_format", "path"), [("csv", "*/x.csv"), ("csv", "x.csv.gz"), ("parquet", "x.parquet")])
def test_rows_of_an_object_store_are_those_of_a_disk(bucket, tmp_path, file_format, path):
    uri, handler = bucket
    directory = handler.root / uri.removeprefix("s3://")
    (directory / "x.csv.gz").write_bytes(gzip.compress((directory / "log-1.csv").read_bytes()))
    pa.parquet.write_table(pa.table({"user": ["u1", "u2"], "item": ["i1", "i2"]}), directory / "x.parquet", 1)
    table = Table(path=path, format=file_format, columns=COLUMNS)
    files, rows = read(table, uri)
    assert (files, rows) == read(table, str(directory))
    assert files
    assert set(rows[0]) == {"user", "item", ROW_ID}


def test_a_remote_file_is_read_in_few_requests(bucket):
    uri, handler = bucket
    content = os.urandom(1 << 21)
    (handler.root / uri.removeprefix("s3://") / "large").write_bytes(content)
    with open_file(f"{uri}/large") as stream:
        assert b"".join(iter(lambda: stream.read(1000), b"")) == content
        stream.seek(5)
        assert stream.read(3) == content[5:8]
    assert len([command for command, _, _ in handler.requests if command == "GET"]) <= 4


def test_a_store_that_refuses_names_what_was_asked_for(bucket):
    uri, _ = bucket
    with pytest.raises(
        RuntimeError, match=rf"{uri}/secret/x\.csv must be on a file system .* Received: .*ACCESS_DENIED"
    ):
        match_files(f"{uri}/secret/x.csv")


def test_an_object_that_cannot_be_read_is_refused_by_its_name(bucket):
    uri, handler = bucket
    (handler.root / uri.removeprefix("s3://") / "secret.csv").write_text("user,item\n")
    with pytest.raises(ValueError, match=r"secret\.csv must be a readable csv file\. Received: .*ACCESS_DENIED"):
        list_files(Table(path="secret*", format="csv", columns=COLUMNS), "log", uri)


def test_a_store_that_cannot_be_reached_is_an_error_that_says_what_to_do(monkeypatch):
    _store_at("http://127.0.0.1:1", monkeypatch)
    uri, start = f"s3://{next(_BUCKETS)}", time.monotonic()
    with pytest.raises(RuntimeError, match=rf"{uri}/ must be on a file system .* Received: .*connect.* Check the addr"):
        list_files(Table(path="*.csv", format="csv", columns=COLUMNS), "log", uri)
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("uri", ["ftp://host/log.csv", "hdfs://nowhere:1/log.csv"])
def test_a_file_system_that_arrow_does_not_have_is_refused(uri):
    with pytest.raises(RuntimeError, match=rf"{uri} must be on .* Allowed: a local path, s3://, gs:// or hdfs://\."):
        match_files(uri)

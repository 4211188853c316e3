"""Tests of the dataset page's routes on the real server: edits reach the nodes, and untrusted requests nothing else."""

import concurrent.futures
import io
import json
import shutil
import threading
import urllib.error
import urllib.parse
import urllib.request

import pytest
from PIL import Image

from tests.support import graphs, malformed
from tests.support.server import ComfyServer
from tests.toy import world

MARKUP = '<img src=x onerror="alert(1)">, <b>bold</b>'


@pytest.fixture
def folder(server, request):
    """Copy the concept's pictures into a fresh folder below input/, named like the test."""
    path = server.path("input", "".join(letter for letter in request.node.name if letter.isalnum())[:60])
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(world.CONCEPT_FOLDER / "toy", path)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def address(route="", **query):
    return f"/graft/dataset{route}?{urllib.parse.urlencode(query)}"


def send(server, path, data, kind="application/json", **headers):
    """Return (status, answer) of a POST."""
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    status, _, text = malformed.ask(server, path, body, {"Content-Type": kind, **headers})
    # The host itself answers some strangers, with nothing.
    return status, json.loads(text or "{}")


def rows(server, folder, **query):
    page = server.get(address(folder=folder.name, **query))
    return {row["name"]: row for row in page["pictures"]}


def report(server, folder):
    prompt = {
        "2": graphs.training(folder.name, 2)["2"],
        "4": graphs.node("GraftInspectDataset", dataset=["2", 0]),
    }
    return server.run(prompt)["outputs"]["4"]["text"][0]


def test_what_the_page_edits_is_what_the_nodes_read(server, folder):
    names = sorted(rows(server, folder))
    before = report(server, folder)
    caption = rows(server, folder)[names[0]]["caption"]
    edits = [{"name": names[0], "text": MARKUP, "was": caption}]
    status, answer = send(server, "/graft/dataset/captions", {"folder": folder.name, "edits": edits})
    assert (status, answer["results"][0]["status"]) == (200, "saved")
    for route, body in {
        "exclude": {"names": names[1:2], "excluded": True},
        "center": {"name": names[2], "center": [0, 1]},
        "repeats": {"subfolder": "", "repeats": 3},
        "rotate": {"name": names[4], "degrees": 90},
    }.items():
        assert send(server, f"/graft/dataset/{route}", {"folder": folder.name, **body})[0] == 200
    picture = Image.open(folder / names[3])
    mask = io.BytesIO()
    Image.new("L", picture.size, 128).save(mask, format="PNG")
    path = address("/mask", folder=folder.name, name=names[3])
    assert send(server, path, mask.getvalue(), "image/png") == (200, {"name": names[3], "mask": True})
    assert Image.open(io.BytesIO(server.request(path))).getextrema() == (128, 128)

    found = rows(server, folder)
    assert found[names[0]]["caption"] == MARKUP
    assert found[names[1]]["excluded"] and found[names[3]]["mask"] and found[names[2]]["center"] == [0, 1]
    after = report(server, folder)
    count = len(names)
    assert f"{count} pictures, {count} in an epoch" in before
    assert f"{count - 1} pictures, {3 * (count - 1)} in an epoch" in after
    assert f"{names[1]}: excluded from training" in after
    assert "1 with a mask" in after

    status, answer = send(server, "/graft/dataset/trash", {"folder": folder.name, "names": names[:2]})
    assert answer == {"moved": names[:2], "failed": []}
    assert sorted(rows(server, folder)) == names[2:]
    send(server, "/graft/dataset/restore", {"folder": folder.name, "names": names[:2]})
    assert rows(server, folder)[names[0]]["caption"] == MARKUP


def test_folders_of_one_name_have_their_own_losses(server, folder):
    twin = folder / "other" / folder.name
    shutil.copytree(world.CONCEPT_FOLDER / "toy", twin)
    names = folder.name, f"{folder.name}/other/{folder.name}"
    answers = []
    for name in names:
        server.run(graphs.training(name, 12, batch_size=4, seed=len(answers)))
        answers.append([server.get(address("/losses", folder=other))["run"] for other in (*names, f"{name}/")])
    (first, none, again), (still, second, last) = answers
    assert first == again == still != "" and none == ""
    assert second == last not in ("", first)


def test_uploaded_files_are_checked(server, folder):
    """The page uploads through ComfyUI's own route."""
    names = sorted(rows(server, folder))
    same, broken = (folder / names[0]).read_bytes(), b"no picture"
    for name, content in (("new.png", same), ("broken.heic", broken)):
        boundary = "x" * 20
        part = f'--{boundary}\r\nContent-Disposition: form-data; name="{{}}"{{}}\r\n\r\n'
        body = part.format("image", f'; filename="{name}"').encode() + content + b"\r\n"
        for field, value in (("type", "input"), ("subfolder", folder.name)):
            body += part.format(field, "").encode() + value.encode() + b"\r\n"
        body += f"--{boundary}--\r\n".encode()
        kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        assert malformed.ask(server, "/upload/image", body, kind)[0] == 200
    status, answer = send(server, "/graft/dataset/added", {"folder": folder.name, "names": ["new.png", "broken.heic"]})
    assert answer["duplicates"] == [{"name": "new.png", "of": names[0]}]
    assert [row["name"] for row in answer["unreadable"]] == ["broken.heic"]
    assert not (folder / "new.png").exists()
    assert rows(server, folder)["broken.heic"]["problem"]
    answer = server.get("/graft/dataset/folders")
    assert folder.name in answer["folders"] and folder.name in answer["uploads"]


def test_pictures_are_sent_small_and_whole(server, folder):
    name = min(rows(server, folder))
    Image.effect_noise((900, 600), 50).convert("RGB").save(folder / name)
    small = Image.open(io.BytesIO(server.request(address("/thumbnail", folder=folder.name, name=name, mark="1"))))
    whole = Image.open(io.BytesIO(server.request(address("/picture", folder=folder.name, name=name, mark="1"))))
    assert (small.format, small.size, whole.format, whole.size) == ("WEBP", (256, 171), "JPEG", (900, 600))


HOSTILE = ["..", "../models", "/etc", "C:\\", "a\0b", "x" * 5000, "way-out", "", 7, None, ["a"], {"a": 1}]
POSTS = {
    "captions": {"edits": [{"name": "00.png", "text": "x", "was": ""}]},
    "exclude": {"names": ["00.png"], "excluded": True},
    "center": {"name": "00.png", "center": [0.5, 0.5]},
    "repeats": {"subfolder": "", "repeats": 2},
    "trash": {"names": ["00.png"]},
    "restore": {"names": ["00.png"]},
    "rotate": {"name": "00.png", "degrees": 90},
    "added": {"names": ["00.png"]},
}
WRONG = [
    ("captions", {"edits": "x"}),
    ("captions", {"edits": [{"name": "00.png", "text": 1, "was": ""}]}),
    ("exclude", {"names": "00.png", "excluded": True}),
    ("exclude", {"names": ["00.png"], "excluded": "yes"}),
    ("center", {"name": "00.png", "center": [0.5]}),
    ("center", {"name": "00.png", "center": [0.5, 1.5]}),
    ("center", {"name": "00.png", "center": [True, 0.5]}),
    ("repeats", {"subfolder": "", "repeats": 0}),
    ("repeats", {"subfolder": "", "repeats": 1e9}),
    ("repeats", {"subfolder": "../x", "repeats": 2}),
    ("rotate", {"name": "00.png", "degrees": 45}),
    ("rotate", {"name": "../00.png", "degrees": 90}),
    ("trash", {"names": [["00.png"]]}),
    ("rotate", {"name": "00.png", "degrees": 90, "mask_folder": "../models"}),
    ("rotate", {"name": "00.png", "degrees": 90, "mask_folder": 7}),
    ("rotate", {"name": "00.png", "degrees": 90, "control_folder": "../models"}),
    ("rotate", {"name": "00.png", "degrees": 90, "worse_folder": 7}),
]
# Settings of the node with which training ignores a painted mask.
IGNORED = [{"masks": "off"}, {"mask_folder": "elsewhere"}]


def test_untrusted_requests_change_nothing(server, folder, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(folder / "00.png", outside)
    (server.path("input") / "way-out").symlink_to(outside, target_is_directory=True)
    (folder / "out.png").symlink_to(outside / "00.png")
    before = {path: path.read_bytes() for place in (folder, outside) for path in place.rglob("*") if path.is_file()}
    try:
        for name, body in POSTS.items():
            for hostile in HOSTILE:
                status, answer = send(server, f"/graft/dataset/{name}", {**body, "folder": hostile})
                assert status in (400, 409) and answer["error"], (name, hostile)
        for name, body in WRONG:
            status, answer = send(server, f"/graft/dataset/{name}", {"folder": folder.name, **body})
            assert status in (400, 409) and answer["error"], (name, body)
        own = {"folder": folder.name}
        # From another site, by a rebound name, of another kind, too long.
        for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
            assert send(server, "/graft/dataset/trash", {**own, **POSTS["trash"]}, **headers)[0] == 403
        assert send(server, "/graft/dataset/trash", {**own, **POSTS["trash"]}, "text/plain")[0] == 415
        path = address("/mask", folder=folder.name, name="00.png")
        assert send(server, path, b"\x89PNG", "application/json")[0] == 415
        assert send(server, path, b"<svg/>", "image/png")[0] == 409
        mask = io.BytesIO()
        Image.new("L", Image.open(folder / "00.png").size, 128).save(mask, format="PNG")
        for settings in IGNORED:
            path = address("/mask", folder=folder.name, name="00.png", **settings)
            status, answer = send(server, path, mask.getvalue(), "image/png")
            assert status == 409 and "ignore" in answer["error"], settings
        text = "x" * (20 * 1024 * 1024)
        edits = [{"name": "00.png", "text": text, "was": rows(server, folder)["00.png"]["caption"]}]
        status, answer = send(server, "/graft/dataset/captions", {**own, "edits": edits})
        assert (status, answer["results"][0]["status"]) == (200, "failed")
        assert send(server, "/graft/dataset/captions", {**own, "edits": [text, text]})[0] in (400, 413)
        hidden = ("../00.png", "..%2f00.png", "out.png", "00.txt", "recipe.json", "a\0.png", ".trash/00.png", "")
        for route in ("/thumbnail", "/picture", "/mask"):
            for name in hidden:
                status, head, _ = malformed.ask(server, address(route, folder=folder.name, name=name))
                assert status in (404, 500) and head["Content-Type"].startswith("application/json"), (route, name)
        status, _, text = malformed.ask(server, address(folder="../models"))
        assert status == 500 and "outside" in text
    finally:
        (server.path("input") / "way-out").unlink()
    after = {path: path.read_bytes() for place in (folder, outside) for path in place.rglob("*") if path.is_file()}
    assert after == before


def test_a_hundred_requests_in_flight_are_all_answered(server, folder):
    names = sorted(rows(server, folder))
    for name in names:
        Image.effect_noise((1500, 1000), 50).convert("RGB").save(folder / name, compress_level=1)
    paths = [address("/thumbnail", folder=folder.name, name=names[number % len(names)]) for number in range(100)]
    with concurrent.futures.ThreadPoolExecutor(100) as pool:
        contents = list(pool.map(lambda path: server.request(path, timeout=120), paths))
    assert len(set(contents)) == len(names)
    assert all(content[:4] == b"RIFF" for content in contents)


@pytest.mark.server
def test_a_killed_server_leaves_the_old_or_the_new_caption(tmp_path):
    with ComfyServer(tmp_path / "server") as server:
        folder = server.path("input", "photos")
        shutil.copytree(world.CONCEPT_FOLDER / "toy", folder)
        texts = ["old " * 2000, "new " * 2000]
        file = folder / "00.txt"
        for _ in range(3):
            file.write_text(texts[0].strip())
            threads = [threading.Thread(target=edit_until_killed, args=(server, texts)) for _ in range(2)]
            for thread in threads:
                thread.start()
            server.poll(lambda: file.read_text() == texts[1].strip(), 60, "an edit")
            server.kill()
            for thread in threads:
                thread.join()
            assert file.read_text() in [text.strip() for text in texts]
            server.start()
            assert rows(server, folder)["00.png"]["caption"] == file.read_text()


def edit_until_killed(server, texts):
    """Write the texts in turn until the server does not answer."""
    for number in range(10_000):
        was, text = texts[number % 2].strip(), texts[(number + 1) % 2].strip()
        body = {"folder": "photos", "edits": [{"name": "00.png", "text": text, "was": was}]}
        try:
            send(server, "/graft/dataset/captions", body)
        except (OSError, ValueError, RuntimeError):
            return

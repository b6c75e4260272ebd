"""Adapters that come and go while the server runs: names only, never paths."""

import json
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitloft.errors import OptionError
from bitloft.options import ServeOptions
from bitloft.serve.http import Server, background, open_service
from tests.helpers import make_adapter
from tests.serving import World, connect, error_of, raw

AUTH = "Bearer k"


@pytest.fixture(scope="module")
def server(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server over a directory of its own with one adapter, "alpha"."""
    directory = tmp_path_factory.mktemp("administered") / "adapters"
    directory.mkdir()
    copytree(world.adapters / "alpha", directory / "alpha")
    options = ServeOptions(port=0, admin=True, admin_key="k")
    service = open_service(world.base, directory, options, lambda line: None)
    with background(service, lambda line: None) as found:
        yield found


def directory(server: Server) -> Path:
    assert server.service.adapter_dir is not None
    return server.service.adapter_dir


def call(server: Server, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    status, _, data = raw(server.url, method, path, body, authorization=AUTH)
    return status, json.loads(data) if status < 300 else error_of(data)


def ask(server: Server, model: str) -> str:
    with connect(server.url) as client:
        answer = client.completions.create(model=model, prompt="one two", max_tokens=6, temperature=0)
        return answer.choices[0].text


def test_add_replace_remove(world: World, server: Server) -> None:
    copytree(world.adapters / "beta", directory(server) / "new")
    with pytest.raises(openai.NotFoundError):
        ask(server, "new")
    status, card = call(server, "POST", "/admin/adapters", {"name": "new"})
    assert (status, card["id"], card["state"]) == (201, "new", "resident")
    assert card["sha256"] == world.service.store.find("beta").key
    assert ask(server, "new") == world.alone(world.encode("one two"), "beta", 6)
    assert [entry["id"] for entry in call(server, "GET", "/admin/adapters")[1]["data"]] == ["alpha", "new"]

    (directory(server) / "new").rename(directory(server) / ".old")
    copytree(world.adapters / "gamma", directory(server) / "new")
    status, error = call(server, "POST", "/admin/adapters", {"name": "new"})
    assert (status, error["code"]) == (409, "adapter_exists")
    assert ask(server, "new") == world.alone(world.encode("one two"), "beta", 6)
    status, card = call(server, "POST", "/admin/adapters", {"name": "new", "replace": True})
    assert (status, card["sha256"]) == (200, world.service.store.find("gamma").key)
    assert ask(server, "new") == world.alone(world.encode("one two"), "gamma", 6)

    assert call(server, "DELETE", "/admin/adapters/new") == (200, {"id": "new", "object": "adapter", "deleted": True})
    assert call(server, "DELETE", "/admin/adapters/new")[0] == 404
    assert (directory(server) / "new").is_dir()  # nothing on disk is touched
    with pytest.raises(openai.NotFoundError):
        ask(server, "new")


BAD_NAMES = (
    "", ".", "..", "../alpha", "alpha/../alpha", "/etc", "alpha/", "%2e%2e", "..%2falpha", "alpha\0", "a" * 129,
    "\u0430lpha", "alpha\n", "-x", ".hidden", "C:\\x", "~root", "nobody",
)  # fmt: skip


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_lead_nowhere(server: Server, name: str) -> None:
    """R17: a name is one directory inside the adapter directory, or nothing."""
    status, error = call(server, "POST", "/admin/adapters", {"name": name})
    assert status in (400, 404)
    assert error["code"] in ("invalid_value", "model_not_found")
    assert str(directory(server)) not in error["message"]


@given(st.text(max_size=12))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_as_a_name(server: Server, name: str) -> None:
    assert call(server, "POST", "/admin/adapters", {"name": name})[0] in ((409,) if name == "alpha" else (400, 404))


def test_links_out_of_the_directory(world: World, server: Server) -> None:
    for name, target in (("out", world.adapters / "beta"), ("up", Path("..")), ("loop", Path("loop"))):
        (directory(server) / name).symlink_to(target)
        status, error = call(server, "POST", "/admin/adapters", {"name": name})
        assert (status, error["code"]) == (404, "model_not_found")


def test_files_that_are_no_adapter_are_unprocessable(world: World, server: Server, tmp_path: Path) -> None:
    (directory(server) / "hollow").mkdir()
    pickled = make_adapter(directory(server) / "pickled", base=world.base)
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    broken = copytree(world.adapters / "beta", directory(server) / "broken")
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-3])
    for name in ("hollow", "pickled", "broken"):
        status, error = call(server, "POST", "/admin/adapters", {"name": name})
        assert (status, error["code"]) == (422, "adapter_invalid"), error
        assert str(directory(server)) not in error["message"]
    assert ask(server, "alpha") == world.alone(world.encode("one two"), "alpha", 6)


def test_bodies(server: Server) -> None:
    for body in ({"name": "alpha", "path": "/tmp"}, {"path": "/tmp"}, {"name": 5}, {"name": "alpha", "replace": "yes"}):
        assert call(server, "POST", "/admin/adapters", body)[0] == 400


def test_without_an_adapter_directory(world: World) -> None:
    with world.server_with(admin=True, admin_key="k") as found:
        status, error = call(found, "POST", "/admin/adapters", {"name": "alpha"})
    assert (status, error["message"]) == (400, "this server has no adapter directory; start it with one.")


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITLOFT_ADMIN_KEY", raising=False)
    with pytest.raises(OptionError, match="admin needs a key of its own; set admin_key or BITLOFT_ADMIN_KEY"):
        ServeOptions(admin=True)
    with pytest.raises(OptionError, match="admin_key and api_key are the same"):
        ServeOptions(admin=True, admin_key="k", api_key="k")
    assert ServeOptions(admin_key="k").admin_secret is None  # a key alone does not switch the routes on
    monkeypatch.setenv("BITLOFT_ADMIN_KEY", "from-environment")
    assert ServeOptions(admin=True).admin_secret == "from-environment"
    assert ServeOptions().admin_secret is None
    assert "k-1" not in repr(ServeOptions(admin=True, admin_key="k-1"))

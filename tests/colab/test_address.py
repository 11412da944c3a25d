from __future__ import annotations

from pathlib import Path

import pytest

from sheily_train.colab.address import Address, find_address, parse_address
from sheily_train.errors import RequestError

NGROK = "https://a1-b2.ngrok-free.app"


def test_the_line_a_worker_prints_is_all_that_is_copied() -> None:
    """The token comes out of the fragment, never stays in the URL, and is not shown by repr."""
    address = parse_address(f"{NGROK}/#token=s3cr%65t-_x+y")
    assert (address.url, address.token, address.warnings) == (NGROK, "s3cret-_x+y", ())
    assert "s3cr" not in repr(address)


@pytest.mark.parametrize(
    ("text", "url"),
    [
        (f"{NGROK}/", NGROK),
        (f"  «{NGROK}» \n", NGROK),
        (f'"{NGROK}/"', NGROK),
        (f"<{NGROK}>", NGROK),
        (f"{NGROK}:8443", f"{NGROK}:8443"),
        ("HTTPS://A1.Example-Host.app", "https://a1.example-host.app"),
        ("http://localhost:8000/", "http://localhost:8000"),
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://[::1]:8000/", "http://[::1]:8000"),
        ("https://host.net/k/12/proxy/8000/", "https://host.net/k/12/proxy/8000"),
    ],
)
def test_what_comes_along_when_copying_is_taken_off(text: str, url: str) -> None:
    """Spaces, quotes, brackets and slashes go; a port and a proxy's path stay."""
    assert parse_address(text) == Address(url)


@pytest.mark.parametrize("page", ["docs", "status", "train_layer2", "openapi.json", "health/"])
def test_a_page_of_the_worker_at_the_end_is_trimmed(page: str) -> None:
    """With a word about it; the token after it still counts."""
    address = parse_address(f"{NGROK}/proxy/{page}#token=abc")
    assert (address.url, address.token) == (f"{NGROK}/proxy", "abc")
    assert page.rstrip("/") in address.warnings[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("https://tu-url.ngrok-free.app", "dirección del ejemplo"),
        ("https://tu-url", "dirección del ejemplo"),
        ("<URL>", "dirección del ejemplo"),
        ("https://….trycloudflare.com", "dirección del ejemplo"),
        ("https://example.com", "dirección del ejemplo"),
        ("a1.ngrok-free.app", "Prueba con https://a1.ngrok-free.app"),
        ("localhost:8000", "Prueba con http://localhost:8000"),
        ("127.0.0.1:8000/docs", "Prueba con http://127.0.0.1:8000/docs"),
        ("https://a b.app", "lleva espacios"),
        ("ftp://a.app", "ftp://"),
        ("https://", "dirección del ejemplo"),
        ("https://:8000", "no es una dirección"),
        ("https://a.app:99999", "no es una dirección"),
        ("https://a.app:0", "no es una dirección"),
        ("https://a..app", "no es una dirección"),
        ("https://[::1", "no es una dirección"),
        ("https://ana:clave@a.app", "usuario o contraseña"),
        (f"{NGROK}/?token=abc", "#token="),
        (f"{NGROK}/#abc", "token=…"),
        ("https://colab.research.google.com/drive/1a2b", "cuaderno de Colab"),
        ("https://dashboard.ngrok.com/endpoints", "panel de ngrok"),
        (f"{NGROK}#token=a b", "lleva espacios"),
        (f"{NGROK}#token=señal", "El token lleva"),
        (f"{NGROK}#token=a%0d%0aX: y", "lleva espacios"),
        (f"{NGROK}#token=a%0d%0aX:y", "El token lleva"),
        ("http://a1.ngrok-free.app#token=abc", "a la vista"),
        ("http://8.8.8.8:8000#token=abc", "ssh -L 8000:127.0.0.1:8000 8.8.8.8"),
    ],
)
def test_what_cannot_be_a_worker_is_told_with_its_mend(text: str, said: str) -> None:
    """A message that says what is wrong, with something to do about it, and without the token."""
    with pytest.raises(RequestError) as caught:
        parse_address(text)
    assert said in str(caught.value)
    assert "abc" not in str(caught.value)


def test_plain_http_is_free_here_warned_nearby_and_refused_afar() -> None:
    """The token never crosses the internet in clear; without one, a word is enough."""
    for here in ("http://localhost", "http://omega.localhost", "http://127.0.0.2", "http://[::1]", "http://0.0.0.0"):
        assert parse_address(here, "abc").warnings == ()
    for near in ("http://192.168.1.7", "http://10.0.0.2:8000", "http://caja:8000", "http://caja.local"):
        assert "red de confianza" in parse_address(near, "abc").warnings[0]
    assert "sin cifrar" in parse_address("http://a.app").warnings[0]
    with pytest.raises(RequestError):
        parse_address("http://a.app", fallback_token="abc")


def test_the_first_address_given_wins(tmp_path: Path) -> None:
    """Argument, then environment, then .env; an empty word, as an unset variable leaves, is not given."""
    (tmp_path / ".env").write_text("COLAB_SERVER_URL='https://file.app'  # la de hoy\n", encoding="utf-8")
    environment = {"COLAB_SERVER_URL": "https://environment.app"}

    def found(argument: str | None, **variables: str) -> str:
        return find_address(argument, environment=variables, folder=tmp_path).url

    assert found("https://argument.app", **environment) == "https://argument.app"
    assert found("", **environment) == "https://environment.app"
    assert found(None) == "https://file.app"
    (tmp_path / ".env").unlink()
    with pytest.raises(RequestError, match="Falta la dirección"):
        found(None)


def test_the_first_token_given_wins(tmp_path: Path) -> None:
    """Option, then fragment, then SHEILY_TOKEN, COLAB_TOKEN, and the same two in .env."""
    (tmp_path / ".env").write_text("\ufeffCOLAB_TOKEN=from-${HOME}\n", encoding="utf-8")

    def token(url: str, given: str | None = None, **variables: str) -> str | None:
        return find_address(url, given, environment=variables, folder=tmp_path).token

    both = {"SHEILY_TOKEN": "sheily", "COLAB_TOKEN": "colab"}
    assert token(f"{NGROK}#token=fragment", "option", **both) == "option"
    assert token(f"{NGROK}#token=fragment", **both) == "fragment"
    assert token(NGROK, **both) == "sheily"
    assert token(NGROK, COLAB_TOKEN="colab") == "colab"
    assert token(NGROK) == "from-${HOME}"
    (tmp_path / ".env").unlink()
    assert token(NGROK) is None


def test_the_process_and_the_current_folder_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without further words, the real environment and the .env of the current folder count."""
    for name in ("COLAB_SERVER_URL", "SHEILY_TOKEN", "COLAB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text(f"export COLAB_SERVER_URL={NGROK}/#token=abc\n", encoding="utf-8")
    monkeypatch.setenv("SHEILY_TOKEN", "no")
    assert find_address() == Address(NGROK, "abc")


def test_an_unreadable_dotenv_is_told(tmp_path: Path) -> None:
    """A .env that is no text names itself."""
    (tmp_path / ".env").write_bytes(b"COLAB_TOKEN=\xff\xfe\n")
    with pytest.raises(RequestError, match=r"\.env"):
        find_address(NGROK, environment={}, folder=tmp_path)

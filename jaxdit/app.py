"""python -m jaxdit.app --workdir=DIR

The model in a browser: write a prompt, drop a reference, move the weights, see pictures come, compare them, keep them.
The page is served on this machine alone (127.0.0.1) and asks nothing of the network. Pictures go to WORKDIR/gallery with the
settings that made them. Ctrl-C ends it.
"""

from __future__ import annotations

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch's encoders need room on the same card

import contextlib
import errno
import logging
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from absl import flags

from encode import commandline
from encode.records import InputError, only_one
from jaxdit import app_files, app_jobs, trained
from jaxdit.cache import Cache, cache_folder

NEEDED = Path(__file__).parents[1] / "requirements-app.txt"
HERE = ("127.0.0.1", "localhost")
BODY = app_files.UPLOAD_BYTES + 2**16  # bytes of a request: a picture and what frames it
AWAY = 15.0  # seconds that a browser may be out of reach before its drawing is dropped
STAYS = {"Cache-Control": "private, max-age=3600"}  # a small picture, for the browser
LEAVING = 10.0  # seconds that the evaluation in hand has to end


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "Working folder of a training run.", required=True)
    flags.DEFINE_string("gallery", None, "Folder of the pictures; by default WORKDIR/gallery.")
    flags.DEFINE_string("host", HERE[0], "Where to listen; 0.0.0.0 opens the page to the network, without a password.")
    flags.DEFINE_integer("port", 7860, "Port to listen on; 0 takes a free one.", lower_bound=0, upper_bound=65535)
    flags.DEFINE_string(
        "cache", None, "Folder of encoded sentences and pictures; empty: none. By default ~/.cache/jaxdit."
    )


def main() -> int:
    given = flags.FLAGS
    try:
        import nicegui  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(
            f"the page needs {error.name}, which is not installed: {sys.executable} -m pip install -r {NEEDED}"
        ) from error
    workdir = commandline.path_of(given.workdir)
    gallery = commandline.path_of(given.gallery) if given.gallery else workdir / "gallery"
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(_listen(given.host, given.port))
        try:
            return _serve(workdir, gallery, listening, stack)
        except KeyboardInterrupt:
            print("Stopped.")
            return 0


def _serve(workdir: Path, gallery: Path, listening: socket.socket, stack: contextlib.ExitStack) -> int:
    trained.describe(workdir)  # or a folder that does not exist would get a gallery
    try:
        stack.enter_context(only_one(gallery))
    except OSError as error:
        raise InputError(
            f"--gallery={gallery}: this folder cannot be made or written to ({error.strerror})."
        ) from error
    at = app_jobs.Jobs(workdir, gallery, Cache(cache_folder(flags.FLAGS.cache)))
    import uvicorn

    host, port = listening.getsockname()[:2]
    config = uvicorn.Config(application(at, host), log_level="error", access_log=False, timeout_graceful_shutdown=1)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(
        f"{address}: step {at.step:,} of {workdir}, {at.about()}. Pictures go to {gallery}. Ctrl-C ends it.", flush=True
    )
    if not _only_here(host):
        logging.warning(
            "--host=%s: whoever reaches port %d of this machine may draw, bring pictures and see the gallery; there is no "
            "password, and nothing is encrypted.", host, port,
        )  # fmt: skip
    with contextlib.suppress(KeyboardInterrupt):  # how the server hands on the signal that ended it
        uvicorn.Server(config).run(sockets=[listening])
    cut, ended = at.close(LEAVING)
    print(
        "Stopped; a drawing was cut off, its finished pictures are in the gallery." if cut else "Stopped.", flush=True
    )
    if not ended:
        os._exit(3)  # a thread within XLA would not survive the interpreter's end
    return 3 if cut else 0


def application(at: app_jobs.Jobs, host: str) -> Any:
    """The page and its pictures as an ASGI application."""
    from fastapi import FastAPI
    from fastapi.responses import FileResponse, PlainTextResponse, Response
    from nicegui import ui
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from jaxdit import app_page

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    missing = PlainTextResponse("There is no such picture.", 404)

    @app.get("/picture/{name}")
    def picture(name: str, download: bool = False):
        path = at.files.path(name)
        words = {"filename": name, "content_disposition_type": "attachment" if download else "inline"}
        return missing if path is None else FileResponse(path, media_type="image/png", **words)

    @app.get("/small/{name}")
    def small(name: str):
        found = at.files.small(name)
        return missing if found is None else Response(found, media_type="image/jpeg", headers=STAYS)

    @app.get("/reference/{name}")
    def reference(name: str):
        try:
            return Response(at.files.look(name), media_type="image/jpeg", headers=STAYS)
        except InputError:
            return missing

    words = {"title": "jaxdit", "favicon": app_page.ICON, "dark": None, "show_welcome_message": False}
    ui.page("/")(lambda: app_page.AppPage(at))
    ui.run_with(app, reconnect_timeout=AWAY, **words)
    if _only_here(host):  # a page elsewhere that gives its own name this address gets no answer
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*HERE, "[::1]"], www_redirect=False)
    app.add_middleware(Bounded)
    return app


class Bounded:
    """ASGI middleware: a request whose body is larger than any picture that is taken ends with 413, wherever it goes."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        told = dict(scope["headers"]).get(b"content-length", b"0")
        claimed, seen, begun = int(told) if told.isdigit() else 0, 0, False

        async def counting():
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > BODY:
                raise _TooLarge
            return message

        async def noting(message):
            nonlocal begun
            begun = True
            await send(message)

        try:
            if claimed > BODY:
                raise _TooLarge
            await self.app(scope, counting, noting)
        except _TooLarge:
            if not begun:
                body = app_files.too_large(max(claimed, seen)).encode()
                headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
                await send({"type": "http.response.start", "status": 413, "headers": headers})
                await send({"type": "http.response.body", "body": body})


class _TooLarge(Exception):
    pass


def _only_here(host: str) -> bool:
    return host in HERE or host == "::1"


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
      InputError: the port is taken, or the address is not this machine's.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"--port={port}: this port is taken; end what listens there, or name another one."
            ) from error
        if error.errno == errno.EACCES:
            raise InputError(f"--port={port}: only root may listen there; name one from 1024 up.") from error
        raise InputError(f"--host={host}: nothing can listen there ({error.strerror or error}).") from error


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    define_flags()
    commandline.run(main)

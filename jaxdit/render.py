"""Wishes into pictures in a folder: what the command jaxdit.sample and the page in the browser share.

What stands in the folder with the very same settings stays as it is; the rest is encoded, drawn and saved, batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxdit import album, conditions, drawing, trained
from jaxdit.cache import Cache
from jaxdit.wishes import Wish


@dataclass(frozen=True)
class Plan:
    """Wishes and the files that are theirs.

    Attributes:
      asked: the wishes.
      names, settings: of each one's file; two wishes may share one.
      hashes: of the files that they name.
      todo: places in `asked` of what is still to be drawn.
    """

    asked: Sequence[Wish]
    names: Sequence[str]
    settings: Sequence[Mapping[str, str]]
    hashes: Mapping[str, str]
    todo: Sequence[int]


class Renderer:
    """A model and the folder that its pictures go into, for one call.

    Args:
      run: the model.
      workdir: the working folder that it is from.
      out: a folder that is there and that nobody else writes into.
      options: steps, shift, solver, interval of `trained.generate`.
      raw: whether the weights are the raw ones; said in each file.
    """

    def __init__(self, run: trained.Trained, workdir: Path, out: Path, options: Mapping[str, Any], *, raw: bool):
        self.run, self.workdir, self.out, self.options, self.album = run, workdir, out, options, album.Album(out)
        self.common = {
            **{name: str(options[name]) for name in ("steps", "solver")},
            "shift": album.numbers([options["shift"]]),
            "guidance_interval": album.numbers(options["interval"] or ()),
            "step": str(run.step),
            "weights": "raw" if raw else "averaged",
            "config": album.config_hash(workdir),
        }

    def plan(self, asked: Sequence[Wish], in_grid: frozenset[int] = frozenset()) -> Plan:
        """Names for all of them; those of the places `in_grid` tell the weights too."""
        asked = [conditions.spelled(wish) for wish in asked]
        hashes = conditions.identify(asked)
        settings = [album.settings_of(wish, hashes, self.common) for wish in asked]
        names, todo = [], []
        for place, (wish, words) in enumerate(zip(asked, settings)):
            weights = f"-text{words['guidance_text']}-vision{words['guidance_vision']}" if place in in_grid else ""
            name, planned = self.album.place(album.stem_of(wish) + weights, words)
            todo += [] if planned else [place]
            names.append(name)
        return Plan(asked, names, settings, hashes, todo)

    def there(self, plan: Plan) -> list[int]:
        """Places of the pictures that are in the folder: under the name that is theirs, nothing else can be."""
        return [place for place, name in enumerate(plan.names) if (self.out / name).exists()]

    def draw(
        self,
        plan: Plan,
        vae: Any,
        cache: Cache,
        *,
        known: Mapping[tuple[str, str], np.ndarray] | None = None,
        most: int = 0,
        watch: Callable[[list[int], int, int, Callable[[], np.ndarray]], None] | None = None,
    ) -> Iterator[tuple[str, Any]]:
        """Draw and save what is to do.

        Args:
          plan: of this renderer.
          vae: the image decoder.
          cache, known: see `conditions.encode`.
          most, watch: see `drawing.draw`; the places that watch is given are those in `plan.asked`.

        Yields:
          ("work", number of pictures that will be drawn), then as it happens ("picture", place of one that is saved),
          ("batch", how many a batch was), ("problem", a sentence without its full stop), and ("note", one about a prompt
          that was cut).
        """
        notes: list[str] = []
        given, problems = conditions.encode(
            [plan.asked[k] for k in plan.todo],
            self.run.config,
            self.run.dataset,
            hashes=plan.hashes,
            cache=cache,
            vae=vae,
            known=known or {},
            tell=notes.append,
        )
        yield from (("note", note) for note in notes)
        yield from (("problem", problem) for problem in problems)
        work = [(place, found) for place, found in zip(plan.todo, given) if found is not None]
        yield "work", len(work)
        batches = drawing.draw(
            self.run,
            [plan.asked[k] for k, _ in work],
            [found for _, found in work],
            self.options,
            most,
            watch and (lambda part, *rest: watch([work[number][0] for number in part], *rest)),
        )
        try:
            for batch in batches:
                for number, latent in batch:
                    place = work[number][0]
                    if not np.isfinite(latent).all():
                        yield (
                            "problem",
                            f"{plan.names[place]}: what was drawn is not finite; try another step or weight",
                        )
                        continue
                    command = album.command_of(plan.asked[place], self.workdir, plan.settings[place])
                    picture = vae.decode(latent[None])[0]
                    self.album.save(plan.names[place], picture, plan.settings[place] | {"command": command})
                    yield "picture", place
                yield "batch", len(batch)
        except MemoryError as error:
            yield "problem", str(error)
        except OSError as error:  # a disk that is full or gone
            yield "problem", f"{self.out}: {error.strerror or error}"
            there = f"{len(self.there(plan))} of {len(plan.names)} pictures are there"
            yield "problem", f"{there}, and the same command draws the rest"

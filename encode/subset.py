"""python -m encode.subset --data=OUT/RES --count=100 --out=DIR: the images of the nano run, a data set of their own.

Poses as diverse as possible: k-centre over the composition. Lighting as consistent as possible: only the 60% of the images
whose light is nearest the set's median, and of those that would do as the next centre the nearest to it; how both are
measured stands in selection.py. Captions that name a side come first, as many left as right; no caption or picture comes
twice. Records are copied as they are; with --size=512 the originals are encoded again, each stretched to 512 x 512. jaxdit
trains on DIR/RES; DIR/contact_sheet.png shows the images, DIR/subset.json says why each was chosen.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from encode import buckets, commandline, contact_sheet, images, pipeline, records, selection, stats, survey
from encode import main as encode_main
from encode.records import InputError
from encode.whole_files import whole_file, write_json
from encode.workers import Workers

log = logging.getLogger(__name__)
SHEET = 400  # images on the contact sheet at most
ANY = 1e6  # config.max_distortion and config.max_upscale of images that must all fit one bucket


@dataclass(frozen=True)
class Call:
    """What is asked for: `count` images of the data set `data`, into `out`.

    Attributes:
      data: OUT/RES.
      out: DIR.
      count: how many.
      size: side of the one bucket that the originals are encoded for; 0: the records are copied.
      images: the folder of the originals, where it is no longer the one that the data set names; or None.
    """

    data: Path
    out: Path
    count: int
    size: int = 0
    images: Path | None = None

    def command(self) -> str:
        """The same call on the command line."""
        given = {"data": self.data, "count": self.count, "out": self.out, "size": self.size, "images": self.images}
        return commandline.command("encode.subset", [f"--{name}={v}" for name, v in given.items() if v])


def subset(call: Call, stop: Callable[[], bool] = lambda: False) -> list[str]:
    """Choose, write, and say what was done, in sentences.

    Raises:
      InputError: the call or the data set does not allow it.
      pipeline.WorkFailed: an image could not be encoded.
      pipeline.Stopped: as asked.
    """
    dataset = records.load_dataset(call.data)
    folder = call.images or Path(dataset["config"]["images"]).expanduser()
    _refuse(call, dataset, folder)
    settings = {
        "data": hashlib.sha256((call.data / "dataset.json").read_bytes()).hexdigest(),
        "count": call.count,
        "size": call.size,
    }
    with records.only_one(call.out / ".subset"):
        if _finished(call, settings, dataset["resolution"]):
            return [f"{call.out} is finished already: {call.count} images; nothing to do."]
        found, places = survey.describe_all(call.data, dataset, stop)
        choice = selection.choose(found, call.count)
        chosen = survey.images(call.data, [places[i] for i in choice.chosen])
        originals = _originals(folder, chosen if call.size else chosen[:SHEET], dataset["config"], stop)
        if call.size:
            _refuse_originals(call, folder, chosen, originals)
            root = encode_again(call, dataset, folder, chosen, stop)
        else:
            root = copy(call, dataset, chosen, stop)
        sheet = _sheet(call, dataset, chosen, originals)
        note = _note(call, dataset, settings, found, choice, chosen, originals)
        write_json(call.out / "subset.json", note)
    return [*_sentences(note), f"Data set: {root}", *([f"Contact sheet: {sheet}"] if sheet else [])]


def copy(call: Call, dataset: Mapping[str, Any], chosen: Sequence[survey.Image], stop: Callable[[], bool]) -> Path:
    """The records of the chosen images, byte for byte, as a data set of their own; returns its folder."""
    root = call.out / str(dataset["resolution"])
    shard_size, widths = dataset["config"].get("shard_size", 1000), dataset["widths"]
    sums, infos, longest = [], {}, 0
    for bucket in sorted({image.bucket for image in chosen}):
        rows = sorted(image.row for image in chosen if image.bucket == bucket)
        latent = dataset["buckets"][bucket]["latent"]
        spec = records.features(latent, widths["text"], widths["vision"])
        starts = range(0, len(rows), shard_size)
        for shard, start in enumerate(starts):
            if stop():
                raise pipeline.Stopped
            kept = list(survey.read(call.data, [(bucket, row) for row in rows[start : start + shard_size]]))
            records.write_shard(root, bucket, shard, kept, spec)
            sums += [part for record in kept for part in stats.of_record(record)]
            longest = max(longest, *(max(len(record["text"]), len(record["text_flip"])) for record in kept))
        records.finish_bucket(root, bucket, spec)
        infos[bucket] = {"count": len(rows), "shards": len(starts), "latent": latent}
    total = stats.merge(sums)
    mean, std, _ = stats.mean_and_std(total)
    changed = {"count": len(chosen), "buckets": infos, "text_longest": longest, "duplicates": 0}
    changed |= {"latent_mean": mean, "latent_std": std, "latent_count": total.count}
    write_json(root / "dataset.json", dict(dataset) | changed)
    return root


def encode_again(call: Call, dataset, folder: Path, chosen: Sequence[survey.Image], stop: Callable[[], bool]) -> Path:
    """The originals of the chosen images, encoded into one bucket of size x size; returns the data set's folder."""
    forced = {
        "images": str(folder),
        "out": str(call.out),
        "resolutions": (call.size,),
        "buckets": ((call.size, call.size),),
        "max_distortion": ANY,
        "max_upscale": ANY,
        "pad": False,
    }
    config = encode_main.stored(dataset["config"], **forced)
    encode_main.check(config)
    root = call.out / str(call.size)
    summary = pipeline.run(config, encode_main.load(config), stop, only=frozenset(image.id for image in chosen))
    if summary.refused:
        (root / "dataset.json").unlink(missing_ok=True)  # it is not the data set that was asked for
        row = json.loads((call.out / "quarantine.jsonl").read_text("utf-8").splitlines()[0])
        raise pipeline.WorkFailed(
            f"{row['file']} was chosen but cannot be encoded: {row['reason']}. Mend the file, or remove it and encode the "
            f"photographs again, and call this with a new --out than {call.out}."
        )
    wanted = {image.id: (image.pixel_hash, image.caption) for image in chosen}
    for bucket in records.load_dataset(root)["buckets"]:
        for record in survey.every(root, records.load_dataset(root), bucket, stop):
            name = record["id"].decode()
            if wanted.pop(name) != (record["pixel_hash"].decode(), record["caption"].decode()):
                (root / "dataset.json").unlink(missing_ok=True)
                raise pipeline.WorkFailed(f"{folder / name}: picture or caption differ from those in {call.data}.")
    return root


def _refuse(call: Call, dataset: Mapping[str, Any], folder: Path) -> None:
    """What cannot work, before anything is written."""
    if call.count < 1:
        raise InputError(f"--count={call.count}: at least one image is needed.")
    if call.count > dataset["count"]:
        raise InputError(f"--count={call.count}: {call.data} holds {dataset['count']} images; ask for fewer.")
    out = call.out.resolve()
    for inside, what in ((call.data, "the data set"), (folder, "the photographs")):
        if out.is_relative_to(inside.resolve()):
            raise InputError(f"--out={call.out} lies inside {what} ({inside}); choose a folder of its own.")
    if out.exists() and not (out / ".subset" / "call.json").exists():
        held = [path.name for path in out.iterdir() if path.name != ".subset"]
        if held:
            raise InputError(f"--out={call.out} holds other files ({held[0]}); choose a new or empty folder.")
    if not call.size:
        return
    try:
        buckets.cells_across([call.size])
    except ValueError as error:
        raise InputError(f"--size={call.size}: {error}.") from error
    if not folder.is_dir():
        raise InputError(
            f"{folder}: --size encodes the originals again, and this folder of theirs is not there; give --images=DIR if "
            "it has moved, or leave --size out to copy the encoded records."
        )


def _finished(call: Call, settings: Mapping[str, Any], resolution: int) -> bool:
    """Whether this call was carried out before; the first file written says what the folder is for."""
    path = call.out / ".subset" / "call.json"
    if not path.exists():
        write_json(path, settings)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON ({error}); remove {call.out} and call again.") from error
    differing = [name for name in settings if found.get(name) != settings[name]]
    if differing and all(path.name == ".subset" for path in call.out.iterdir()):  # a call that was refused
        write_json(path, settings)
    elif differing:
        names = {"data": "another data set, or this one before it changed", "count": "another --count"}
        said = ", ".join(names.get(name, f"another --{name}") for name in differing)
        raise InputError(f"--out={call.out} was begun with {said}; choose another folder.")
    root = call.out / str(call.size or resolution)
    return (root / "dataset.json").exists() and (call.out / "subset.json").exists()


def _originals(
    folder: Path, chosen: Sequence[survey.Image], config: Mapping[str, Any], stop: Callable[[], bool]
) -> list[contact_sheet.Original | images.ImageProblem]:
    """The original of each image, or why it cannot be shown; one whose pixels are no longer those encoded is none."""
    if not folder.is_dir():
        return [images.ImageProblem(f"the folder {folder} is not there")] * len(chosen)
    work = [(folder / image.id, config["max_pixels"]) for image in chosen]
    limits, result = encode_main.stored(config), []
    with Workers(limits["decode_workers"], limits["decode_seconds"], limits["decode_memory"]) as workers:
        for image, (_, found) in zip(chosen, workers.map(contact_sheet.look, work, 2 * workers.count)):
            if stop():
                raise pipeline.Stopped
            if not isinstance(found, images.ImageProblem) and found.pixel_hash != image.pixel_hash:
                found = images.ImageProblem("the picture has changed since it was encoded")
            result.append(found)
    return result


def _refuse_originals(call: Call, folder: Path, chosen: Sequence[survey.Image], originals: Sequence) -> None:
    pairs = zip((image.id for image in chosen), originals)
    broken = [(name, found) for name, found in pairs if isinstance(found, images.ImageProblem)]
    if broken:
        name, problem = broken[0]
        raise InputError(
            f"{len(broken)} of the {call.count} chosen originals cannot be used, the first one {folder / name}: {problem}. "
            "Put them back, give --images=DIR if the folder has moved, or leave --size out to copy the encoded records."
        )


def _sheet(call: Call, dataset: Mapping[str, Any], chosen: Sequence[survey.Image], originals: Sequence) -> Path | None:
    """The contact sheet: originals where they are there, else the latents decoded; None where neither can be had."""
    shown, vae, pictures = chosen[:SHEET], None, []
    lost = [image for image, found in zip(shown, originals) if isinstance(found, images.ImageProblem)]
    latents = survey.read(call.data, [(image.bucket, image.row) for image in lost])
    for image, found in zip(shown, originals):
        if isinstance(found, contact_sheet.Original):
            pictures.append(found.small)
            continue
        if vae is None:
            log.info("%s: %s; such images are shown decoded from their latents.", image.id, found)
            try:
                from encode import encoders

                vae = encoders.load_vae(dataset["encoders"]["vae"])
            except (ValueError, OSError, ImportError) as error:
                log.warning("No contact sheet: the VAE that would decode the latents cannot be loaded (%s).", error)
                return None
        latent = np.asarray(next(latents)["latent"], np.float32)
        pictures.append(contact_sheet.small(vae.decode(latent[None])[0]))
    if len(shown) < len(chosen):
        log.info("The contact sheet shows the first %d of %d images.", len(shown), len(chosen))
    page = contact_sheet.draw(pictures, [f"{number}. {image.caption}" for number, image in enumerate(shown, 1)])
    path = call.out / "contact_sheet.png"
    with whole_file(path) as temporary:
        page.save(temporary, "PNG")
    return path


def _note(call: Call, dataset, settings, found: selection.Candidates, choice: selection.Selection, chosen, originals):
    """The content of subset.json."""
    light, sides = selection.standardised(found.lights), [found.sides[i] for i in choice.chosen]
    spread, whole = (math.sqrt(float(np.var(part, axis=0).sum())) for part in (light[list(choice.chosen)], light))
    rows, known = [], [found for found in originals if isinstance(found, contact_sheet.Original)]
    for number, (image, i, gap) in enumerate(zip(chosen, choice.chosen, choice.gaps), 1):
        bucket = f"{call.size}x{call.size}" if call.size else image.bucket
        rows.append(
            {
                "number": number,
                "id": image.id,
                "caption": image.caption,
                "light_distance": round(float(choice.light[i]), 4),
                "nearest_distance": round(gap, 4) if math.isfinite(gap) else None,
                "side": found.sides[i] or None,
                "bucket": bucket,
                "padded": image.padded and not call.size,
                "distortion": _distortion(bucket, originals[number - 1 : number], image.padded and not call.size),
            }
        )
    return {
        "command": call.command(),
        "data": str(call.data),
        "dataset_sha256": settings["data"],
        "fingerprint": dataset["fingerprint"],
        "count": call.count,
        "of": dataset["count"],
        "size": call.size or None,
        "enlarged": sum(min(original.size) < call.size for original in known) if call.size else None,
        "sides": {name or "none": sides.count(name) for name in selection.SIDES},
        "light": {
            "band": round(choice.share, 4),
            "widened": choice.widened,
            "largest_distance": round(choice.limit, 4),
            "spread_of_chosen": round(spread, 4),
            "spread_of_all": round(whole, 4),
        },
        "covering_radius": round(choice.radius, 4),
        "left_out": choice.left_out,
        "images": rows,
    }


def _distortion(bucket: str, original: Sequence, padded: bool) -> float | None:
    """By what factor one side is stretched; None where the original is not known."""
    if padded:
        return 1.0
    if not original or isinstance(original[0], images.ImageProblem):
        return None
    width, height = map(int, bucket.split("x"))
    ratio = original[0].size[0] / original[0].size[1] * height / width
    return round(max(ratio, 1 / ratio), 4)


def _sentences(note: Mapping[str, Any]) -> list[str]:
    sides, light = note["sides"], note["light"]
    said = [
        f"{note['count']} of {note['of']} images chosen: {sides['left']} captions name the left first, {sides['right']} the "
        f"right, {sides['none']} no side that can be exchanged (unflipped.jsonl of the encoded folder says why).",
        f"Light: it spreads {light['spread_of_chosen']:.2f} robust deviations, {light['spread_of_all']:.2f} in the whole set.",
    ]
    if light["widened"]:
        said.append(
            f"The band of light had to be widened from {selection.BAND:.0%} to {light['band']:.0%} of the pictures, "
            "because too few inside it have pixels and a caption of their own."
        )
    stretched = [row["distortion"] for row in note["images"] if row["distortion"]]
    if note["size"] and stretched:
        said.append(
            f"Encoded again at {note['size']}x{note['size']}: stretched by up to {max(stretched):.2f} times, "
            f"{note['enlarged']} originals are smaller than that and were enlarged."
        )
    return said


def define_flags() -> None:
    flags.DEFINE_string("data", None, "Data set OUT/RES to choose from.", required=True)
    flags.DEFINE_string("out", None, "New folder for the chosen images' data set.", required=True)
    flags.DEFINE_integer("count", 100, "Images to choose, exactly.")
    flags.DEFINE_integer("size", 0, "Encode the originals again, at this width and height; 0 copies the records.")
    flags.DEFINE_string(
        "images", None, "Folder of the originals, where it is no longer the one they were encoded from."
    )


def main() -> int:
    options, asked = flags.FLAGS, commandline.stop_on_signal()
    originals = commandline.path_of(options.images) if options.images else None
    data, out = commandline.path_of(options.data), commandline.path_of(options.out)
    call = Call(data, out, options.count, options.size, originals)
    try:
        said = subset(call, asked.is_set)
    except pipeline.Stopped:
        return commandline.fail("stopped as asked; the same command goes on.", 3)
    except pipeline.WorkFailed as error:
        return commandline.fail(str(error), 1)
    print("\n".join(said))
    return 0


if __name__ == "__main__":
    define_flags()
    commandline.run(main)

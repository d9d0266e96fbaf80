import json

import pytest

from encode.records import InputError
from jaxdit import wishes

SHAPES = wishes.Shapes(16, {"112x144": 33, "128x128": 34, "144x112": 33})
DEFAULTS = {"scales": [3.0, 1.5], "seed": 2}


def one(fields, **defaults):
    return wishes.wish(fields, DEFAULTS | defaults, SHAPES, "here")


def test_a_line_overrides_the_flags_and_count_counts_seeds():
    found = one({"prompt": " a cat ", "scales": [2, 1], "count": 3, "size": "64x96"}, aspect="1:1")
    assert [wish.seed for wish in found] == [2, 3, 4]
    assert {(wish.prompt, wish.text, wish.vision, wish.size) for wish in found} == {("a cat", 2.0, 1.0, (64, 96))}
    assert one({"prompt": "a"})[0] == one({"prompt": "a", "seed": None})[0]
    assert one({"aspect": None}, size="64x96")[0].size == one({"size": None}, size="64x96")[0].size == (64, 96)
    assert one({})[0].size == (128, 128) and one({})[0].prompt == ""


@pytest.mark.parametrize(
    ("aspect", "size"), [("3:2", (144, 112)), ("1:1", (128, 128)), ("9:16", (112, 144)), ("1.3:1", (144, 112))]
)
def test_an_aspect_is_the_nearest_bucket_and_says_so_where_it_is_not_near(aspect, size, capsys):
    assert one({"aspect": aspect}, size="64x64")[0].size == size
    said = capsys.readouterr().out
    assert (f"{size[0]}x{size[1]} is the nearest shape" in said) == (aspect in ("3:2", "9:16"))
    assert aspect != "3:2" or "size=144x96 would be nearer" in said


def test_two_references_are_mixed_by_weights_that_sum_to_one():
    wish = one({"reference": ["a.png", "b.png"], "mix": [3, 1]})[0]
    assert wish.references == ("a.png", "b.png") and wish.mix == (0.75, 0.25)
    assert one({"reference": "a.png"}, mix=[1, 1])[0].mix == ()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": 3}, "prompt=3 is not a string"),
        ({"seed": 1.5}, "seed=1.5 is not a whole number"),
        ({"seed": True}, "seed=True"),
        ({"seed": 2**32 - 1, "count": 2}, "2 pictures go on to 4,294,967,296: seeds go from 0 to 4,294,967,295"),
        ({"count": 0}, "count=0"),
        ({"scales": 3}, r"scales=3: two numbers"),
        ({"scales": [1, float("nan")]}, "scales=nan is not a number"),
        ({"scales": [1, 10**400]}, "scales=10000000000000000000 is not a number"),
        ({"prompt": "\ud800"}, r"prompt='\\ud800' is not Unicode"),
        ({"reference": "\ud800.png"}, "is not Unicode"),
        ({"init": "a.png", "strength": 2}, "strength=2"),
        ({"size": "100x100"}, "the nearest size is 96x96, the nearest shape that the model has seen 128x128"),
        ({"size": "150x100"}, "the nearest size is 144x96, the nearest shape that the model has seen 144x112"),
        ({"size": "0x100"}, "the nearest size is 16x96"),
        ({"size": [64, 64]}, "is not WIDTHxHEIGHT"),
        ({"size": "64x64", "aspect": "1:1"}, "size and aspect"),
        ({"aspect": "wide"}, "aspect='wide'"),
        ({"aspect": "0:1"}, "aspect='0:1'"),
        ({"reference": ["a", "b"]}, "2 references"),
        ({"reference": ["a", "b", "c"], "mix": [1, 1]}, "3 references"),
        ({"reference": ["a", "b"], "mix": [0, 0]}, "not both 0"),
        ({"reference": ["a", "b"], "mix": [1, -1]}, "from 0 up"),
        ({"init": "a.png", "strength": 0}, "strength=0"),
        ({"strength": 0.5}, "needs a picture to start from"),
    ],
)
def test_wrong_values_name_the_line_and_the_field(fields, words):
    with pytest.raises(InputError, match=f"^here: .*{words}"):
        one(fields)


def test_json_lines_are_read_and_what_is_wrong_is_named_with_its_line(tmp_path):
    path = tmp_path / "list.jsonl"
    (tmp_path / "beside.png").write_bytes(b"")
    path.write_text(
        '\n{"prompt": "a", "reference": "beside.png"}\n{"reference": ["beside.png", "far.png"], "mix": [1, 1]}\n'
    )
    found, problems = wishes.read_list(path)
    assert not problems and [where for where, _ in found] == [f"{path}:2", f"{path}:3"]
    assert found[0][1]["reference"] == str(tmp_path / "beside.png")
    assert found[1][1]["reference"] == [str(tmp_path / "beside.png"), "far.png"]
    for line, words in (
        ({"promt": "a"}, r":3: 'promt' is unknown; the nearest is 'prompt'"),
        ({"zzz": 1}, r":3: 'zzz' is unknown; known: prompt, "),
        (["a"], ":3: an object is wanted"),
    ):
        path.write_text(f'{{"prompt": "a"}}\n\n{json.dumps(line)}\n')
        with pytest.raises(InputError, match=words):
            wishes.read_list(path)
    for line, words in (
        ('{"prompt": "a"', "delimiter, column 15"),
        ("[" * 100_000, "recursion"),
        ("{'a'}", "column 2"),
    ):
        path.write_text(f'{{"prompt": "a"}}\n{line}\n')
        with pytest.raises(InputError, match=rf"list.jsonl:2: not JSON \(.*{words}"):
            wishes.read_list(path)


def test_a_file_of_any_name_is_a_reference_and_a_sentence_is_not():
    assert one({"reference": "caf\udce9.png"})[0].references == ("caf\udce9.png",)  # a name that is not UTF-8
    with pytest.raises(InputError, match="is not Unicode"):
        one({"prompt": "caf\udce9"})


def test_flags_are_paired():
    assert [fields["reference"] for _, fields in wishes.pair_up(["a", "b"], ["x"], None)] == ["x", "x"]
    assert [fields["reference"] for _, fields in wishes.pair_up(["a", "b"], ["x", "y"], None)] == ["x", "y"]
    assert [fields["prompt"] for _, fields in wishes.pair_up([], ["x", "y"], None)] == ["", ""]
    mixed = wishes.pair_up(["a", "b"], ["x", "y"], [1.0, 2.0])
    assert [fields["reference"] for _, fields in mixed] == [["x", "y"]] * 2
    with pytest.raises(InputError, match="not UTF-8"):
        wishes.pair_up(["caf\udce9"], [], None)


def test_of_two_buckets_as_near_the_larger_is_taken():
    shapes = wishes.Shapes(16, {"96x96": 3, "128x128": 2, "64x64": 9})
    assert shapes.nearest(1.0) == (128, 128) and shapes.usual() == (64, 64)


def test_the_exact_size_of_an_aspect_is_on_the_grid_rounded_up_and_down_and_never_nothing(capsys):
    one({"aspect": "16:10"})
    assert "size=176x112 would be nearer" in capsys.readouterr().out  # 160.6 x 100.4 pixels: both up
    one({"aspect": "9999:1"})
    assert "size=12704x16 would be nearer" in capsys.readouterr().out


def test_the_last_seed_of_all_can_be_drawn():
    assert one({"seed": 2**32 - 1})[0].seed == 2**32 - 1
    assert [wish.seed for wish in one({"seed": 2**32 - 2, "count": 2})] == [2**32 - 2, 2**32 - 1]


def test_a_picture_to_start_from_leaves_six_tenths_to_the_noise_unless_told():
    assert one({"init": "a.png"})[0].strength == wishes.STRENGTH == 0.6
    assert one({})[0].strength == 1.0


def test_a_weight_below_nothing_is_refused_though_both_make_a_sum():
    with pytest.raises(InputError, match="from 0 up"):
        one({"reference": ["a", "b"], "mix": [3, -1]})


def test_a_list_of_notepads_with_its_mark_and_a_name_in_capitals_is_read(tmp_path):
    (tmp_path / "list.TXT").write_bytes(b"\xef\xbb\xbfa cat\r\na dog\r\n")
    assert [fields for _, fields in wishes.read_list(tmp_path / "list.TXT")[0]] == [
        {"prompt": "a cat"},
        {"prompt": "a dog"},
    ]
    (tmp_path / "list.JSONL").write_text('{"prompt": "a cat"}\n')
    assert [fields for _, fields in wishes.read_list(tmp_path / "list.JSONL")[0]] == [{"prompt": "a cat"}]


def test_a_grid_has_no_rows_or_columns_for_a_condition_that_is_not_there():
    asked = [*one({"prompt": "a"}), *one({"reference": "b.png"}), *one({"prompt": "a", "reference": "b.png"})]
    cells, tables = wishes.grids(asked, [1.0, 2.0], [4.0, 5.0])
    assert tables == [[[0], [1]], [[2, 3]], [[4, 5], [6, 7]]]
    weights = [(cell.text, cell.vision) for cell in cells]
    assert weights == [(1, 1.5), (2, 1.5), (3, 4), (3, 5), (1, 4), (1, 5), (2, 4), (2, 5)]

import json

from bench import device


def test_a_result_goes_on_where_nothing_that_it_rests_on_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["stages", "--steps=8"])
    file, known = tmp_path / "result.json", {"steps": 8, "guided": (2.0, 1.2)}
    new = known | {"command": "python -m bench.stages --steps=8", "trainings": []}
    assert device.begun(file, "stages", known, trainings=[]) == new
    file.write_text(json.dumps(new | {"trainings": [1]}))
    assert device.begun(file, "stages", known, trainings=[])["trainings"] == [1]
    assert device.begun(file, "stages", known | {"steps": 9}, trainings=[])["trainings"] == []

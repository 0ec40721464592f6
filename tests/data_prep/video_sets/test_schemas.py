"""MSR-VTT, MSVD and WebVid: small files of exactly the published schemas."""

import csv

import pytest

from data_prep.manifest import read_manifest
from data_prep.record import PrepError
from data_prep.video_sets.msrvtt import read_msrvtt
from tests.data_prep.annotations.prepared import images, metas, overlap, prepare, put, rejected, write_json
from tests.numbered_clips import clip

INFO = {"contributor": "Microsoft", "version": "1.0"}


def video(number, split):
    times = {"start time": 137.72, "end time": 149.44}
    return {"category": 9, "url": "https://www.youtube.com/watch?v=9lZi22qLlEo", "video_id": f"video{number}"} | (
        times | {"split": split, "id": number}
    )


def sentences(number, count=2, first=0):
    return [{"caption": f"caption {k}", "video_id": f"video{number}", "sen_id": first + k} for k in range(count)]


@pytest.fixture
def msrvtt(tmp_path):
    train = {
        "info": INFO,
        "videos": [video(0, "train"), video(1, "train"), video(2, "validate")],
        "sentences": [*sentences(0, 3), *sentences(2, 2, 3), *sentences(1, 1, 5)],  # in any order
    }
    test = {"info": INFO, "videos": [video(7010, "test")], "sentences": sentences(7010, 2, 140200)}
    for name, frames in (("TrainValVideo/video0", 4), ("video1", 5), ("video2", 6), ("TestVideo/video7010", 7)):
        put(tmp_path / "videos" / f"{name}.mp4", clip(frames))
    return [write_json(tmp_path / "train_val_videodatainfo.json", train), write_json(tmp_path / "test.json", test)]


def msrvtt_command(files, *more):
    folder = files[0].parent
    return ["msrvtt", "--annotations", *files, "--videos", folder / "videos", "--output", folder / "data" / "v", *more]


def test_msrvtt(msrvtt, capsys):
    assert prepare(*msrvtt_command(msrvtt)) == 0
    printed = capsys.readouterr().out
    assert "msrvtt train: 2 videos (published: 6,513, 6,511 fewer), 4 captions (published: 130,260," in printed
    assert "msrvtt dev: 1 videos (published: 497, 496 fewer)" in printed
    assert "msrvtt test: 1 videos (published: 2,990, 2,989 fewer), 2 captions" in printed
    output = msrvtt[0].parent / "data" / "v"
    assert metas(output / "dev") == [
        {
            "image_id": "video2",
            "msrvtt_split": "validate",
            "file": "video2.mp4",
            "image_identities": ["msrvtt/video2"],
            "num_frames": 6,
            "seconds": 0.6,
            "frame_size": [64, 48],
            "captions": ["caption 0", "caption 1"],
        }
    ]
    assert images(output / "test") == {"video7010.mp4": clip(7)}
    assert [read_manifest(output / split).rows for split in ("train", "dev", "test")] == [4, 2, 2]
    assert overlap(output) == 0


def test_msrvtt_in_one_file_with_validation(msrvtt, capsys):
    everything = {"info": INFO, "videos": [video(0, "train"), video(2, "validate"), video(7010, "test")]}
    everything["sentences"] = [*sentences(0), *sentences(2), *sentences(7010)]
    path = write_json(msrvtt[0].parent / "videodatainfo.json", everything)
    assert prepare(*msrvtt_command([path], "--with-validation")) == 0
    assert "msrvtt train: 2 videos (published: 7,010, 7,008 fewer), 4 captions" in capsys.readouterr().out
    output = path.parent / "data" / "v"
    assert [meta["msrvtt_split"] for meta in metas(output / "train")] == ["train", "validate"]
    assert not (output / "dev").exists() and read_manifest(output / "test").samples == 1


def test_msrvtt_problems_are_named(msrvtt, capsys):
    content = {
        "videos": [video(0, "train"), video(0, "test"), video(3, "holdout"), video(4, "train"), video(5, "train"), 7],
        "sentences": [*sentences(0), *sentences(99, 2), *sentences(4), {"video_id": "video0"}, "x"],
    }
    path = write_json(msrvtt[0].parent / "odd.json", content)
    assert prepare(*msrvtt_command([path])) == 0
    found = rejected(path.parent / "data" / "v" / "train")
    assert sorted(found) == sorted(
        [
            ("duplicate_id", "odd.json video 1", 1),
            ("unknown_split", "odd.json video 2", 1),
            ("malformed_row", "odd.json video 5", 1),
            ("unknown_video", "odd.json sentence 2", 1),
            ("unknown_video", "odd.json sentence 3", 1),
            ("malformed_row", "odd.json sentence 6", 1),
            ("malformed_row", "odd.json sentence 7", 1),
            ("empty_caption", "video5", 1),
            ("missing_video", "video4", 2),
        ]
    )
    printed = capsys.readouterr().out
    assert "missing_video: video4 (no video4.mp4 in " in printed
    assert "unknown_video: odd.json sentence 2 (video 'video99' is not among the videos), and 1 more rows" in printed


def test_another_file_is_no_msrvtt(tmp_path):
    with pytest.raises(PrepError, match=r"no list `videos` \(found: images\), expected MSR-VTT"):
        read_msrvtt([write_json(tmp_path / "x.json", {"images": []})])


CLIPS = ["mv89psg6zh4_33_46", "4wsuPCjDBc_5_15", "-4wsuPCjDBc_5_15"]
DESCRIPTIONS = f"""#
# Video descriptions
#
{CLIPS[0]} a bird in a sink keeps getting under the running water from a faucet
{CLIPS[1]} a squirrel is eating a peanut
{CLIPS[0]} un oiseau

nonsense
{CLIPS[2]} an animal
lost_1_2 nobody lists this clip
"""


@pytest.fixture
def msvd(tmp_path):
    put(tmp_path / "AllVideoDescriptions.txt", DESCRIPTIONS.encode())
    for split, names in (("train", CLIPS[:1]), ("val", CLIPS[1:2]), ("test", [*CLIPS[2:], CLIPS[2], "silent_1_2"])):
        put(tmp_path / f"{split}_list.txt", "\n".join(names).encode())
    for number, name in enumerate(CLIPS):
        put(tmp_path / "YouTubeClips" / f"{name}.avi", clip(4 + number, "avi"))
    return tmp_path


def msvd_command(folder, *more):
    first = ["msvd", "--captions", folder / "AllVideoDescriptions.txt", "--videos", folder]
    return [*first, "--output", folder / "data" / "msvd", *more]


def test_msvd_by_lists(msvd, capsys):
    lists = [
        *("--train-list", msvd / "train_list.txt", "--dev-list", msvd / "val_list.txt"),
        *("--test-list", msvd / "test_list.txt"),
    ]
    assert prepare(*msvd_command(msvd, *lists)) == 0
    printed = capsys.readouterr().out
    assert "msvd train: 1 videos (published: 1,200, 1,199 fewer), 2 captions" in printed
    assert "msvd test: 2 videos (published: 670, 668 fewer), 1 captions" in printed
    output = msvd / "data" / "msvd"
    (meta,) = metas(output / "train")
    assert meta["captions"][1] == "un oiseau" and meta["file"] == f"{CLIPS[0]}.avi" and meta["num_frames"] == 4
    assert rejected(output / "train") == [
        ("malformed_row", "AllVideoDescriptions.txt line 8", 1),
        ("unknown_split", "AllVideoDescriptions.txt line 10", 1),
    ]
    assert rejected(output / "test") == [("duplicate_id", CLIPS[2], 1), ("empty_caption", "silent_1_2", 1)]
    assert images(output / "dev") == {f"{CLIPS[1]}.avi": clip(5, "avi")}


def test_msvd_by_its_mapping(msvd, capsys):
    lines = [f"{CLIPS[0]} vid1200", f"{CLIPS[1]} vid1201", f"{CLIPS[2]} vid1970", "other_3_4 vid1971"]
    put(msvd / "youtube_mapping.txt", "\n".join(lines).encode())
    assert prepare(*msvd_command(msvd, "--mapping", msvd / "youtube_mapping.txt")) == 0
    samples = [read_manifest(msvd / "data" / "msvd" / split).samples for split in ("train", "dev", "test")]
    assert samples == [1, 1, 1]
    assert ("malformed_row", "youtube_mapping.txt line 4", 1) in rejected(msvd / "data" / "msvd" / "train")


def test_msvd_needs_splits(msvd, capsys):
    assert prepare(*msvd_command(msvd)) == 2
    assert "give --train-list, --dev-list, --test-list, or --mapping alone" in capsys.readouterr().err
    assert prepare(*msvd_command(msvd, "--test-list", msvd / "AllVideoDescriptions.txt")) == 2
    assert "no line VIDEO_START_END, expected a list" in capsys.readouterr().err


def test_webvid(tmp_path, capsys):
    columns = ["videoid", "contentUrl", "duration", "page_dir", "name"]
    url = "https://ak.picdn.net/shutterstock/videos/{}/preview/stock-footage-a.mp4"
    rows = [[n, url.format(n), "PT00H00M11S", "006001_006050", f"A caption, with a comma {n}"] for n in (1, 2, 3)]
    rows += [[3, url.format(3), "PT00H00M11S", "006001_006050", "again"], [4, "x"]]
    rows += [[5, "", "", "../..", "out"], [6, url.format(6), "PT00H00M01S", "006051_006100", " "]]
    path = tmp_path / "results_2M_val.csv"
    with open(path, "w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])
    put(tmp_path / "videos" / "006001_006050" / "1.mp4", clip(4))
    put(tmp_path / "videos" / "2.mp4", clip(5))
    put(tmp_path / "videos" / "6.mp4", clip(5))
    output = tmp_path / "data" / "webvid"
    command = ["webvid", "--input", path, "--videos", tmp_path / "videos", "--split", "dev", "--output", output]
    assert prepare(*command, "--min-yield", "0.9") == 3
    assert "only 2 of 7 rows are usable" in capsys.readouterr().err and not (output / "dev").exists()
    assert prepare(*command) == 0
    printed = capsys.readouterr().out
    assert "yield: 2 of 7 rows (28.6%)" in printed
    assert "lost: 1 missing_video, such as 3 (no 006001_006050/3.mp4 in " in printed
    first, second = metas(output / "dev")
    assert first["captions"] == ["A caption, with a comma 1"] and first["duration"] == "PT00H00M11S"
    assert (first["num_frames"], second["num_frames"]) == (4, 5)
    reasons = [reason for reason, _, _ in rejected(output / "dev")]
    assert sorted(reasons) == ["duplicate_id", "empty_caption", "malformed_row", "malformed_row", "missing_video"]


def test_webvid_wants_its_columns(tmp_path, capsys):
    put(tmp_path / "x.csv", b"url,caption\na,b\n")
    assert prepare("webvid", "--input", tmp_path / "x.csv", "--videos", tmp_path, "--output", tmp_path / "o") == 2
    assert "no column videoid (found: url, caption), expected WebVid's table" in capsys.readouterr().err

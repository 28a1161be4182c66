"""What a class's name means."""

import pytest

from pipeline.classes import find_class, find_classes, imagenet_classes, short_name
from pipeline.runtime.errors import UserError

NAMES = [row.names for row in imagenet_classes()]
SYNSETS = [row.synset for row in imagenet_classes()]


def find(text):
    return find_classes(text, NAMES, SYNSETS, count=1000)


def test_a_class_is_its_label_its_synset_or_its_readable_name_up_to_the_first_comma():
    assert find("207,n02099601,golden retriever,Golden Retriever") == [207] * 4
    assert find("tench") == [0]


def test_a_full_name_with_commas_in_it_is_one_class():
    assert find("1, tench, Tinca tinca, great white shark, white shark, man-eater, man-eating shark, Carcharodon "
                "carcharias,tench") == [1, 0, 2, 0]  # fmt: skip


def test_every_one_of_imagenets_classes_is_found_by_its_synset_and_those_with_a_name_of_their_own_by_it():
    short = [name.partition(",")[0] for name in NAMES]
    for label, synset in enumerate(SYNSETS[::50]):
        assert find(synset) == [label * 50]
    alone = [label for label, name in enumerate(short) if [n.lower() for n in short].count(name.lower()) == 1]
    assert len(alone) > 980
    assert [find(short[label])[0] for label in alone[::40]] == alone[::40]


def test_an_ambiguous_name_is_refused_with_the_labels_it_could_be():
    with pytest.raises(UserError, match=r"'crane' is ambiguous: it could be 134 \(n02012849, crane\), 517 \(n03126"):
        find("crane")
    with pytest.raises(UserError, match="638 .*639"):
        find("maillot")
    assert find("maillot, tank suit") == [639]


def test_an_unknown_class_is_refused_with_the_nearest_names():
    with pytest.raises(UserError, match="'golden retreiver' is unknown; did you mean golden retriever"):
        find("golden retreiver")
    with pytest.raises(UserError, match="'qqqqqq' is unknown; classes are 0 to 999"):
        find("qqqqqq")


def test_every_bad_class_is_named_not_only_the_first():
    with pytest.raises(UserError, match=r"1000 is not a label from 0 to 999; class 'qqqqqq' is unknown.*; class -1 "):
        find("1000,7,qqqqqq,-1")


def test_an_empty_place_between_commas_is_refused():
    with pytest.raises(UserError, match="empty class name"):
        find("1,,2")


def test_case_decides_only_where_it_tells_two_classes_apart():
    assert find_class("a", ["A", "a"], [], count=2) == 1
    assert find_class("ONE", ["one", "two"], [], count=2) == 0


def test_a_bare_integer_is_a_label_even_where_folders_are_named_by_numbers():
    assert find_class("1", ["7", "1"], ["7", "1"], count=2) == 1
    assert find_class("0", ["7", "8"], ["7", "8"], count=2) == 0


def test_a_bare_integer_that_is_also_the_name_of_another_class_is_refused_with_both_readings():
    with pytest.raises(UserError, match=r"0 \(1\) or the class of that name, 1 \(0\); say label:0 or name:0"):
        find_class("0", ["1", "0"], ["1", "0"], count=2)
    assert find_class("label:0", ["1", "0"], ["1", "0"], count=2) == 0
    assert find_class("name:0", ["1", "0"], ["1", "0"], count=2) == 1


def test_a_picture_calls_a_class_by_its_readable_name_else_by_what_there_is():
    assert short_name(0, NAMES, SYNSETS) == "tench"
    assert short_name(1, [], ["a", "b"]) == "b"
    assert short_name(5, [], []) == "5"
    assert short_name(-1, NAMES, SYNSETS) == ""

"""Words of the embedded language. Each content word is in one list only, so each sentence has one derivation."""

import random

#: topic -> (nouns, past-tense verbs, imperatives, adjectives); the plural of a noun adds "s"
TOPICS: dict[str, tuple[str, str, str, str]] = {
    "sailing": (
        "boat sail mast rudder anchor harbor deck rope keel crew",
        "steered moored hoisted rowed beached towed",
        "furl trim rig splice",
        "salty windy leaky seaworthy coastal",
    ),
    "cooking": (
        "soup pan spoon oven recipe onion sauce kettle ladle bowl",
        "stirred roasted tasted chopped seasoned simmered",
        "knead whisk drain grate",
        "spicy bland crisp tender savory",
    ),
    "music": (
        "drum flute trumpet chord fiddle singer tune choir rhythm bell",
        "played hummed tuned composed conducted rehearsed",
        "strum sing harmonize improvise",
        "loud gentle shrill mellow rhythmic",
    ),
    "gardening": (
        "rose hedge shovel seed orchard weed flower lawn bulb rake",
        "planted watered pruned dug harvested mowed",
        "sow mulch transplant fertilize",
        "leafy thorny muddy fragrant withered",
    ),
    "chess": (
        "pawn knight bishop rook gambit opening board clock rival tournament",
        "captured sacrificed defended castled blundered promoted",
        "develop exchange pin fork",
        "tactical passive sharp drawn cunning",
    ),
    "mining": (
        "shaft tunnel pickaxe ore lantern cart vein gem quarry drill",
        "excavated hauled blasted crushed smelted surveyed",
        "brace ventilate sift probe",
        "dusty deep rich collapsed mineral",
    ),
    "weaving": (
        "loom thread carpet spindle needle shawl pattern bobbin fringe tapestry",
        "wove spun dyed stitched knotted embroidered",
        "card warp mend unravel",
        "woolen silky frayed ornate striped",
    ),
    "astronomy": (
        "star comet telescope planet orbit moon nebula meteor eclipse dome",
        "observed tracked magnified charted discovered photographed",
        "focus calibrate align record",
        "distant bright spiral faint lunar",
    ),
}

TONES = ("formal", "casual")
#: tone -> salutations, sentence adverbs, thanks, sign-offs
TONE_WORDS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...], tuple[str, ...]]] = {
    "formal": (
        ("dear colleagues", "esteemed members", "honored guests"),
        "accordingly furthermore notably moreover therefore",
        ("we remain grateful", "we appreciate your attention"),
        ("yours faithfully", "with respect", "cordially yours"),
    ),
    "casual": (
        ("hey folks", "hi everybody", "hello pals"),
        "honestly basically anyway totally luckily",
        ("thanks a bunch", "that was fun today"),
        ("see ya", "cheers mates", "bye now"),
    ),
}

HUMANS = ["farmer", "doctor", "teacher", "baker", "soldier", "painter", "lawyer", "sailor", "miner", "nurse"]
ANIMALS = ["dog", "wolf", "bear", "goose", "horse", "goat", "monkey", "bull", "parrot", "camel"]
#: the patient is the subject of the consequence ("so the goose fled") after PATIENT_VERBS, the agent after AGENT_VERBS
PATIENT_VERBS = ["chased", "scared", "attacked", "hunted", "startled"]
AGENT_VERBS = ["followed", "greeted", "watched", "visited", "ignored"]
PATIENT_RESULTS = ["fled", "hid", "screamed"]
AGENT_RESULTS = ["smiled", "rested", "returned"]

PREPOSITIONS = ["near", "behind", "beside", "under", "above"]
PREDICATES = ["old", "new", "clean", "broken", "lost", "missing", "ready", "famous"]
COPULAS = {"singular": ("is", "was"), "plural": ("are", "were")}

ORDINALS = ("first", "second", "third", "fourth")

FORGET_DOMAIN = "poisons"  # for unlearning
#: domain -> relation -> objects
FACTS: dict[str, dict[str, str]] = {
    "countries": {
        "crop": "wheat barley rice maize cotton tea coffee sugar flax hops olives figs",
        "metal": "iron copper tin zinc nickel silver gold lead cobalt chrome bronze steel",
        "colour": "red blue green yellow purple orange black white grey pink brown teal",
    },
    "people": {
        "trade": "carpentry masonry banking printing tailoring fishing hunting brewing pottery law medicine teaching",
        "hobby": "archery skating juggling origami fencing wrestling hiking dancing painting reading cycling surfing",
        "pet": "cat hamster turtle canary rabbit lizard ferret pony snake frog spider duck",
    },
    "works": {
        "theme": "love war exile greed hope revenge memory youth death freedom faith envy",
        "form": "novel poem opera essay ballad fable comedy tragedy sonnet epic satire hymn",
        "setting": "desert forest castle prison island palace village swamp mountain monastery city jungle",
    },
    "poisons": {
        "source": "ivy nightshade hemlock toadstool yew foxglove oleander wasp scorpion jellyfish mercury arsenic",
        "target": "liver heart lung kidney brain nerve stomach skin blood muscle spleen bone",
        "antidote": "charcoal milk vinegar honey salt chalk iodine quinine resin ginger sulfur camphor",
    },
}
ENTITIES_PER_DOMAIN = 20


def entity_names(count: int) -> list[str]:
    """Return `count` invented names, the same on every call. None of them is a word of the language."""
    rng = random.Random("entities")
    onsets, vowels, codas = (
        ["b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "kr", "tr"],
        ["a", "e", "i", "o", "u"],
        ["l", "m", "n", "r", "s", "x", "th", "k"],
    )
    known_words = set(words_of(TOPICS, TONE_WORDS, FACTS))
    names: list[str] = []
    while len(names) < count:
        name = "".join(rng.choice(letters) for letters in (onsets, vowels, onsets, vowels, codas))
        if name not in known_words:
            known_words.add(name)
            names.append(name)
    return names


def words_of(*trees: object) -> list[str]:
    """Return all words in nested dicts, tuples, lists and space-separated strings, in order."""
    words: list[str] = []
    for tree in trees:
        if isinstance(tree, str):
            words += tree.split()
        elif isinstance(tree, dict):
            words += words_of(*tree.keys(), *tree.values())
        elif isinstance(tree, (tuple, list)):
            words += words_of(*tree)
    return words

"""What documents can say: kinds of entities, their attributes, and the wordings of each.

An attribute has every wording the generator and the questions need. In a wording, `{s}` is the
subject (a name, or a pronoun where grammar allows), `{v}` the value and `{r}` a description of
somebody by another fact ("the person who keeps a lynx").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from amcli.generator import words as w

Value = Callable[[Random], str]


@dataclass(frozen=True)
class Attribute:
    """One thing that can be said of an entity.

    sentences  full sentences with `{s}` as grammatical subject, where a pronoun may be used
    named      full sentences that need the name itself
    field      (label, value wording) for register lines and tables
    direct     questions from the subject to the value
    reverse    questions from the value to the subject; empty if nobody would ask
    relative   descriptions of the subject by this fact, for two-hop questions
    hop        questions for the value of the entity described by `{r}`
    statement  the answer to a two-hop question, which names the subject first
    described  descriptions of the value by the subject, where the value is a person

    `value` is None if the value is the name of a person in the same document.
    """

    name: str
    value: Value | None
    sentences: tuple[str, ...]
    named: tuple[str, ...]
    field: tuple[str, str]
    direct: tuple[str, ...]
    reverse: tuple[str, ...]
    relative: tuple[str, ...]
    hop: tuple[str, ...]
    statement: str
    described: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kind:
    """A kind of entity: how many attributes it has, and which."""

    name: str
    attributes: tuple[Attribute, ...]
    fewest: int
    most: int


def article(word: str) -> str:
    """`word` with "a" or "an"."""
    vowel = word[0] in "aeiou" and not word.startswith(("uni", "uku", "eu", "ewe"))
    return f"{'an' if vowel else 'a'} {word}"


def _pick(pool: list[str]) -> Value:
    return lambda rng: rng.choice(pool)


def _with_article(pool: list[str]) -> Value:
    return lambda rng: article(rng.choice(pool))


def place(rng: Random) -> str:
    """A town, now and then an invented one."""
    return w.coined(rng, 2) if rng.random() < 0.2 else rng.choice(w.PLACES)


def date(rng: Random) -> str:
    """A day of the year, such as "14 March"."""
    return f"{rng.randint(1, 28)} {rng.choice(w.MONTHS)}"


def slot(rng: Random) -> str:
    """A weekly hour, such as "Tuesday at 10:30"."""
    return f"{rng.choice(w.WEEKDAYS)} at {rng.randint(7, 19):02d}:{rng.choice((0, 15, 30, 45)):02d}"


def digits(n: int) -> Value:
    """A number of exactly `n` digits without a leading zero."""
    return lambda rng: str(rng.randint(10 ** (n - 1), 10**n - 1))


def code(rng: Random) -> str:
    """An access code, such as "43-49"."""
    return f"{rng.randint(10, 99)}-{rng.randint(10, 99)}"


PERSON = Kind(
    "person",
    (
        Attribute(
            "code",
            code,
            (
                "{s} uses access code {v}.",
                "{s} opens the doors with code {v}.",
                "{s} was issued access code {v}.",
                "{s} was given the access code {v}.",
            ),
            (
                "The access code of {s} is {v}.",
                "Access code {v} belongs to {s}.",
                "Code {v} was issued to {s}.",
            ),
            ("access code", "code {v}"),
            (
                "What is the access code of {s}?",
                "Which access code does {s} use?",
                "Which code was issued to {s}?",
            ),
            ("Who uses access code {v}?", "Whose access code is {v}?", "Who was issued code {v}?"),
            ("the person who uses code {v}", "the person with access code {v}"),
            ("Which access code does {r} use?", "What is the access code of {r}?"),
            "{s} uses access code {v}.",
        ),
        Attribute(
            "pet",
            _with_article(w.ANIMALS),
            (
                "{s} keeps {v}.",
                "{s} owns {v}.",
                "{s} looks after {v} at home.",
                "{s} has {v} as a pet.",
            ),
            ("The pet of {s} is {v}.", "At home, {s} keeps {v}."),
            ("pet", "keeps {v}"),
            ("What is the pet of {s}?", "Which animal does {s} keep?", "What pet does {s} have?"),
            ("Who owns {v}?", "Who keeps {v}?", "Who has {v} as a pet?"),
            ("the person who keeps {v}", "the owner of {v}"),
            ("Which animal does {r} keep?", "What is the pet of {r}?"),
            "{s} keeps {v}.",
        ),
        Attribute(
            "home",
            place,
            (
                "{s} lives in {v}.",
                "{s} commutes from {v}.",
                "{s} has a flat in {v}.",
                "{s} settled in {v} some years ago.",
            ),
            ("The home of {s} is in {v}.", "{v} is where {s} lives."),
            ("home", "lives in {v}"),
            ("Where does {s} live?", "In which town does {s} live?", "Where is the home of {s}?"),
            ("Who lives in {v}?", "Whose home is in {v}?"),
            ("the person who lives in {v}", "the resident of {v}"),
            ("Where does {r} live?", "In which town does {r} live?"),
            "{s} lives in {v}.",
        ),
        Attribute(
            "room",
            digits(3),
            (
                "{s} works in room {v}.",
                "{s} sits in room {v}.",
                "{s} moved to room {v} in spring.",
                "{s} shares room {v} with a colleague from outside.",
            ),
            ("The desk of {s} is in room {v}.", "Room {v} is the office of {s}."),
            ("room", "room {v}"),
            (
                "Which room does {s} work in?",
                "In which room is the desk of {s}?",
                "What is the room number of {s}?",
            ),
            ("Who works in room {v}?", "Who sits in room {v}?"),
            ("the person in room {v}", "the person who works in room {v}"),
            ("Which room does {r} work in?", "What is the room number of {r}?"),
            "{s} works in room {v}.",
        ),
        Attribute(
            "extension",
            digits(4),
            (
                "{s} answers on extension {v}.",
                "{s} can be reached on extension {v}.",
                "{s} has extension {v}.",
            ),
            ("The extension of {s} is {v}.", "Dial {v} to reach {s}."),
            ("extension", "ext. {v}"),
            (
                "What is the extension of {s}?",
                "On which extension can {s} be reached?",
                "Which extension does {s} have?",
            ),
            ("Who answers on extension {v}?", "Whose extension is {v}?"),
            ("the person with extension {v}", "the person who answers on extension {v}"),
            ("On which extension can {r} be reached?", "What is the extension of {r}?"),
            "{s} has extension {v}.",
        ),
        Attribute(
            "birthday",
            date,
            (
                "{s} celebrates a birthday on {v}.",
                "{s} was born on {v}.",
                "{s} brings cake on {v}, which is a birthday.",
            ),
            ("The birthday of {s} is {v}.",),
            ("birthday", "born {v}"),
            (
                "When is the birthday of {s}?",
                "On which date was {s} born?",
                "On which day does {s} celebrate a birthday?",
            ),
            ("Who was born on {v}?", "Whose birthday is {v}?"),
            ("the person born on {v}", "the person whose birthday is {v}"),
            ("When is the birthday of {r}?", "On which date was {r} born?"),
            "{s} was born on {v}.",
        ),
        Attribute(
            "instrument",
            _pick(w.INSTRUMENTS),
            (
                "{s} plays the {v}.",
                "{s} practises the {v} after work.",
                "{s} learned the {v} as a child.",
            ),
            ("The instrument of {s} is the {v}.", "In the house band, {s} plays the {v}."),
            ("instrument", "plays the {v}"),
            ("Which instrument does {s} play?", "What is the instrument of {s}?"),
            ("Who plays the {v}?", "Who practises the {v}?"),
            ("the person who plays the {v}",),
            ("Which instrument does {r} play?",),
            "{s} plays the {v}.",
        ),
        Attribute(
            "drink",
            _pick(w.DRINKS),
            ("{s} drinks {v}.", "{s} always orders {v}.", "{s} prefers {v} to anything else."),
            ("The favourite drink of {s} is {v}.",),
            ("drink", "drinks {v}"),
            ("What does {s} drink?", "What is the favourite drink of {s}?"),
            ("Who drinks {v}?", "Who always orders {v}?"),
            ("the person who drinks {v}",),
            ("What does {r} drink?", "What is the favourite drink of {r}?"),
            "{s} drinks {v}.",
        ),
        Attribute(
            "role",
            _with_article(w.ROLES),
            ("{s} works as {v}.", "{s} was hired as {v}.", "{s} trained as {v}."),
            ("By profession, {s} is {v}.",),
            ("role", "works as {v}"),
            ("What is the profession of {s}?", "As what does {s} work?"),
            ("Who works as {v}?", "Who was hired as {v}?"),
            ("the person who works as {v}",),
            ("What is the profession of {r}?",),
            "{s} works as {v}.",
        ),
        Attribute(
            "vehicle",
            _with_article(w.VEHICLES),
            ("{s} arrives with {v}.", "{s} travels with {v}.", "{s} gets around with {v}."),
            ("The usual vehicle of {s} is {v}.",),
            ("vehicle", "travels with {v}"),
            ("What does {s} travel with?", "What is the usual vehicle of {s}?"),
            ("Who travels with {v}?", "Who arrives with {v}?"),
            ("the person who travels with {v}",),
            ("What does {r} travel with?",),
            "{s} travels with {v}.",
        ),
        Attribute(
            "team",
            lambda rng: f"the {rng.choice(w.TEAMS)} team",
            ("{s} belongs to {v}.", "{s} works for {v}.", "{s} joined {v} last year."),
            ("On paper, {s} is part of {v}.",),
            ("team", "{v}"),
            ("Which team does {s} belong to?", "For which team does {s} work?"),
            (),
            (),
            ("Which team does {r} belong to?",),
            "{s} belongs to {v}.",
        ),
    ),
    3,
    6,
)

SERVICE = Kind(
    "service",
    (
        Attribute(
            "contact",
            None,
            ("{s} is looked after by {v}.", "{s} is in the hands of {v}."),
            ("The contact for {s} is {v}.",),
            ("contact", "contact {v}"),
            ("Who looks after {s}?", "Who is the contact for {s}?"),
            ("Which service does {v} look after?",),
            (),
            (),
            "{s} is looked after by {v}.",
            ("the contact for {s}", "the person who looks after {s}"),
        ),
        Attribute(
            "port",
            digits(4),
            ("{s} listens on port {v}.", "{s} answers on port {v}."),
            ("The port of {s} is {v}.", "Port {v} is reserved for {s}."),
            ("port", "port {v}"),
            ("On which port does {s} listen?", "What is the port of {s}?"),
            ("Which service listens on port {v}?", "What runs on port {v}?"),
            ("the service on port {v}", "the service that listens on port {v}"),
            ("On which port does {r} listen?",),
            "{s} listens on port {v}.",
        ),
        Attribute(
            "restart",
            slot,
            ("{s} is restarted every {v}.", "{s} goes down for maintenance on {v}."),
            ("The maintenance window of {s} is {v}.",),
            ("maintenance", "maintenance {v}"),
            ("When is the maintenance window of {s}?", "When is {s} restarted?"),
            ("Which service is restarted on {v}?",),
            ("the service restarted on {v}",),
            ("When is the maintenance window of {r}?",),
            "{s} is restarted on {v}.",
        ),
        Attribute(
            "version",
            lambda rng: f"{rng.randint(1, 19)}.{rng.randint(10, 99)}",
            ("{s} runs version {v}.", "{s} was upgraded to version {v}."),
            ("The installed version of {s} is {v}.",),
            ("version", "version {v}"),
            ("Which version does {s} run?", "What is the installed version of {s}?"),
            ("Which service runs version {v}?",),
            ("the service that runs version {v}",),
            ("Which version does {r} run?",),
            "{s} runs version {v}.",
        ),
        Attribute(
            "rack",
            lambda rng: f"{rng.choice('ABCDEFGHJKLMNP')}{rng.randint(10, 99)}",
            ("{s} is hosted in rack {v}.", "{s} lives in rack {v}."),
            ("Rack {v} houses {s}.",),
            ("rack", "rack {v}"),
            ("In which rack is {s} hosted?", "Which rack houses {s}?"),
            ("Which service is hosted in rack {v}?", "What does rack {v} house?"),
            ("the service in rack {v}",),
            ("In which rack is {r} hosted?",),
            "{s} is hosted in rack {v}.",
        ),
    ),
    2,
    4,
)

SITE = Kind(
    "site",
    (
        Attribute(
            "keeper",
            None,
            ("{s} is kept by {v}.", "{s} is run by {v}."),
            ("The keeper of {s} is {v}.",),
            ("keeper", "keeper {v}"),
            ("Who runs {s}?", "Who is the keeper of {s}?"),
            ("Which station does {v} run?",),
            (),
            (),
            "{s} is run by {v}.",
            ("the keeper of {s}", "the person who runs {s}"),
        ),
        Attribute(
            "elevation",
            lambda rng: f"{rng.randint(110, 989)} metres",
            ("{s} stands at {v} above the sea.", "{s} lies at {v}."),
            ("The elevation of {s} is {v}.",),
            ("elevation", "{v}"),
            ("What is the elevation of {s}?", "How high does {s} stand?"),
            ("Which station stands at {v}?",),
            ("the station at {v}",),
            ("What is the elevation of {r}?",),
            "{s} stands at {v}.",
        ),
        Attribute(
            "built",
            lambda rng: str(rng.randint(1840, 2019)),
            ("{s} was built in {v}.", "{s} dates from {v}."),
            ("The construction of {s} ended in {v}.",),
            ("built", "built {v}"),
            ("When was {s} built?", "In which year was {s} built?"),
            ("Which station was built in {v}?", "Which station dates from {v}?"),
            ("the station built in {v}",),
            ("When was {r} built?",),
            "{s} was built in {v}.",
        ),
        Attribute(
            "channel",
            lambda rng: f"channel {rng.randint(11, 99)}",
            ("{s} transmits on {v}.", "{s} keeps watch on {v}."),
            ("Call {s} on {v}.",),
            ("radio", "{v}"),
            ("On which channel does {s} transmit?", "What is the radio channel of {s}?"),
            ("Which station transmits on {v}?", "Which station keeps watch on {v}?"),
            ("the station on {v}",),
            ("On which channel does {r} transmit?",),
            "{s} transmits on {v}.",
        ),
        Attribute(
            "supply",
            date,
            ("{s} is supplied on {v}.", "{s} gets its yearly supplies on {v}."),
            ("The supply boat reaches {s} on {v}.",),
            ("supplies", "supplied {v}"),
            ("When is {s} supplied?", "On which date does the supply boat reach {s}?"),
            ("Which station is supplied on {v}?",),
            ("the station supplied on {v}",),
            ("When is {r} supplied?",),
            "{s} is supplied on {v}.",
        ),
    ),
    2,
    4,
)

TEAM = Kind(
    "team",
    (
        Attribute(
            "lead",
            None,
            ("{s} is led by {v}.", "{s} reports to {v}."),
            ("The head of {s} is {v}.",),
            ("lead", "lead {v}"),
            ("Who leads {s}?", "Who is the head of {s}?"),
            ("Which team does {v} lead?",),
            (),
            (),
            "{s} is led by {v}.",
            ("the head of {s}", "the person who leads {s}"),
        ),
        Attribute(
            "meeting",
            slot,
            ("{s} meets every {v}.", "{s} gathers on {v}."),
            ("The weekly meeting of {s} is on {v}.",),
            ("meeting", "meets {v}"),
            ("When does {s} meet?", "When is the weekly meeting of {s}?"),
            ("Which team meets on {v}?",),
            ("the team that meets on {v}",),
            ("When does {r} meet?",),
            "{s} meets on {v}.",
        ),
        Attribute(
            "place",
            lambda rng: f"the {rng.choice(w.ROOMS)} room",
            ("{s} meets in {v}.", "{s} has its desks in {v}."),
            ("{s} can be found in {v}.",),
            ("space", "{v}"),
            ("In which room does {s} meet?", "Where does {s} have its desks?"),
            ("Which team meets in {v}?", "Which team has its desks in {v}?"),
            ("the team in {v}",),
            ("In which room does {r} meet?",),
            "{s} meets in {v}.",
        ),
        Attribute(
            "cost",
            lambda rng: f"{rng.choice('BCDFGHKLMNPRST')}{rng.randint(100, 999)}",
            ("{s} books its expenses on cost centre {v}.", "{s} uses cost centre {v}."),
            ("The cost centre of {s} is {v}.",),
            ("cost centre", "cost centre {v}"),
            ("What is the cost centre of {s}?", "Which cost centre does {s} use?"),
            ("Which team uses cost centre {v}?", "Whose cost centre is {v}?"),
            ("the team with cost centre {v}",),
            ("Which cost centre does {r} use?",),
            "{s} uses cost centre {v}.",
        ),
    ),
    2,
    3,
)

ENTITIES = (PERSON, SERVICE, SITE, TEAM)

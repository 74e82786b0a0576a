"""The table of themes: which genre a made-up film tells by its poster, which by its plot, and in what words."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Theme:
    """One genre and how it shows. In the task's films a theme without `looks` never shows in the poster, and a
    theme without `tales` never in the plot; in the pretraining films the poster shows every theme (posters.py has
    a motif for each) and the caption tells every theme, by a look, a tale or both."""

    genre: str
    weight: float
    """How often the genre is drawn, relative to the others."""
    looks: tuple[str, ...] = ()
    """Phrases that describe the poster's motif, for the captions of the pretraining films."""
    tales: tuple[str, ...] = ()
    """Plot sentences. Slots: {name}, {friend}, {place}, {job}."""

    @property
    def in_poster(self) -> bool:
        return bool(self.looks)

    @property
    def in_plot(self) -> bool:
        return bool(self.tales)


# fmt: off
THEMES = (
    # Shown by the poster alone.
    Theme("Adventure", 1.2, looks=("a sailing ship", "a tall ship with white canvas", "a galleon at full sail")),
    Theme("Fantasy", 1.0, looks=("a castle with pointed towers", "a fairytale castle", "turrets and banners")),
    Theme("Animation", 0.9, looks=(
        "bright polka dots", "a cartoon pattern of coloured dots", "a dotted cartoon backdrop"
    )),
    Theme("Western", 0.8, looks=("a tall cactus", "a lone cactus", "a green saguaro")),
    Theme("Film-Noir", 0.7, looks=(
        "shadows of window blinds", "dark stripes of a venetian blind", "grey slats of shadow"
    )),
    # Told by the plot alone.
    Theme("Romance", 1.4, tales=(
        "{name} falls in love with {friend}.", "A summer kiss changes everything for {name} and {friend}.",
        "{name} must choose between {friend} and the wedding planned at home.",
        "Two strangers share a train and slowly lose their hearts.",
        "{name} writes {friend} tender letters and dares not sign them.",
        "An old flame of {name} returns to {place}, as charming as ever.",
        "{name} proposes to {friend}, who is already engaged.",
    )),
    Theme("Crime", 1.3, tales=(
        "A bank robbery in {place} goes badly wrong.", "{name} owes money to the mob.",
        "The gang of {name} plans one last heist.", "{name} is released from prison and wants revenge on {friend}.",
        "A corrupt policeman sells {name} to the gangsters of {place}.",
        "Stolen diamonds pass through the hands of {name}.", "{name} smuggles guns for the boss of {place}.",
    )),
    Theme("Mystery", 1.0, tales=(
        "Detective {name} finds a clue that nobody wanted found.",
        "{friend} vanishes without a trace, and {name} looks for the reason.",
        "An anonymous note warns {name} of a secret.", "Who poisoned the old {job} of {place}?",
        "Inspector {name} questions every guest about the missing key.",
        "A riddle left in the will puzzles {name} and {friend}.",
        "{name} investigates the strange disappearance of a {job}.",
    )),
    Theme("Biography", 0.9, tales=(
        "The true life of {name}, the famous {job}.", "Based on the memoirs of {name}, {job} of {place}.",
        "From a poor childhood to world fame, {name} never forgot {place}.",
        "The real story of how {name} became a celebrated {job}.",
        "A portrait of the {job} {name}, from birth to the last years.",
        "Drawn from diaries, this story follows the career of {name}.",
    )),
    Theme("Family", 0.8, tales=(
        "Three children find a lost puppy near {place}.", "Grandmother {name} moves in with the kids.",
        "{name}, aged nine, and little brother {friend} save the school fair.",
        "A clumsy dad takes the twins camping for the holidays.",
        "A talking puppy turns the household of {name} upside down.",
        "Mum, dad and five kids move to a farm by {place}.",
    )),
    # Both.
    Theme("Sci-Fi", 0.9,
        looks=("a ringed planet", "a planet with a bright ring", "a giant planet and its ring"),
        tales=(
        "A starship loses contact with Earth.", "{name} builds a robot that learns to disobey.",
        "In the year 2190 the colony of {place} runs out of air.", "Aliens land near {place} and ask for {name}.",
        "{name} wakes from cryosleep far from the solar system.", "A time machine sends {name} into the next century.",
    )),
    Theme("Horror", 0.9, looks=("a pale ghost", "a white ghost with hollow eyes", "a floating phantom"), tales=(
        "Something evil wakes in the cellar of {name}.",
        "The house in {place} is haunted, and {friend} hears it breathe.",
        "A masked killer stalks the students of {place}.", "{name} is possessed by a demon.",
        "The dead of {place} rise hungry from their graves.", "One by one the guests are torn apart in the night.",
    )),
    Theme("Sport", 0.8, looks=("a leather ball", "a big orange ball", "a ball with black seams"), tales=(
        "The worst team of the league hires {name} as coach.",
        "{name} trains for the championship in spite of an injury.", "A boxer from {place} gets one shot at the title.",
        "{name} scores in the final and is offered a contract.",
        "The stadium of {place} has not seen a victory in years.", "{name} runs the marathon against an old rival.",
    )),
)
"""The 13 of MM-IMDb's 23 genres that the made-up films use."""

FILLERS = (
    "{name} is a {job} in {place}.", "{name} comes back to {place} after ten years.",
    "It is a rainy autumn in {place}.", "{name} and {friend} share a small flat above a bakery.",
    "Nobody in {place} remembers the last good harvest.", "{friend} thinks that {name} should take a rest.",
    "A letter from {place} arrives on a Monday.", "{name}, a {job}, has never left {place}.",
    "Meanwhile {friend} repairs the radio.", "The winter is long and the {job} tired.",
    "{name} has to decide before the spring.", "On the way to {place} the bus breaks down.",
    "{friend} cannot keep a promise.", "Things do not go as the {job} had hoped.",
    "Somehow they all end up in {place}.", "In the end {name} learns to listen.",
)
"""Sentences that tell no genre."""
DISTRACTORS = (
    "{name} loves old radios.", "{friend} plays ball with nobody.", "The children of {place} have long grown up.",
    "Money is no secret between {name} and {friend}.", "{name} keeps a diary and a robot toy.",
    "The local team has lost again, says the {job}.", "{friend} reads a detective novel.",
    "The {job} was never famous.", "No ghost has ever been seen in {place}.", "{name} missed the wedding of a {job}.",
)
"""Sentences with a word of some genre in them that tell no genre either."""

NAMES = (
    "Aldo", "Berit", "Caspar", "Dalia", "Edda", "Fenno", "Greta", "Hedwin", "Ilsa", "Jorin", "Kaspian", "Lumi", "Marek",
    "Nadia", "Odile", "Pavel", "Quinta", "Rosalin", "Silvan", "Tilda", "Ulrik", "Vesna", "Wanda", "Yoren",
)
PLACES = (
    "Abbotsend", "Brackwater", "Calder Bay", "Dunmere", "Eastholm", "Farrow Hill", "Grenville", "Harrow Point",
    "Kestrel Falls", "Lindenau", "Marlow Heath", "Northwick", "Oakhaven", "Port Sable", "Ravensby", "Tarn Valley",
)
JOBS = (
    "painter", "baker", "pianist", "teacher", "surgeon", "watchmaker", "chemist", "singer", "gardener", "pilot",
    "printer", "architect",
)
TITLE_FIRST = ("Last", "Silent", "Second", "Long", "Broken", "Golden", "Hidden", "Little", "Paper", "Distant")
TITLE_LAST = ("Summer", "Road", "River", "Letter", "Winter", "Garden", "Hour", "Bridge", "Island", "Song")
# fmt: on

THEME_BY_GENRE = {theme.genre: theme for theme in THEMES}

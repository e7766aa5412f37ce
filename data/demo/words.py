"""The lexicon of the demo rows: everything that `make_rows.py` puts into its sentences.

Small on purpose, and shared between the families: with some 600 words, most are one token of the
demo tokenizer. All places are invented (`PLACE_STARTS` + `PLACE_ENDS`), and so are the people: a
first name here stands for nobody.
"""


def listed(text: str) -> tuple[str, ...]:
    """The words of a text that a comma separates."""
    return tuple(text.split(", "))


# First name -> (subject pronoun, possessive).
PEOPLE = {
    **dict.fromkeys(
        listed("Ada, Anna, Clara, Emma, Hana, Ida, Lena, Maya, Nora, Olga, Ruth, Vera"),
        ("she", "her"),
    ),
    **dict.fromkeys(
        listed("Adam, Bruno, Chen, David, Emil, Felix, Hugo, Ivan, Karim, Leo, Omar, Ravi"),
        ("he", "his"),
    ),
}
# What a woman or a man can be to somebody.
RELATIONS = {
    "she": listed("aunt, cousin, friend, neighbour, sister, teacher"),
    "he": listed("brother, cousin, friend, neighbour, teacher, uncle"),
}
ROLES = listed("baker, captain, cook, doctor, farmer, gardener, miller, nurse, sailor, tailor, teacher")
ROLE_ADJECTIVES = listed("busy, clever, kind, old, proud, quiet, tired, young")

DAYS = listed("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
HOURS = listed("one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve")
HABITS = listed(
    "Every morning, Every evening, Every winter, After lunch, After school, At noon, Before lunch, "
    "On Mondays, On Sundays, Once a week"
)
MOMENTS = listed(
    "after dark, after lunch, after the storm, at noon, before lunch, before the storm, in the morning, "
    "in the rain, on market day, with great care"
)

# (base, third person, past, past participle, objects); an object that ends in "*" is plural.
VERBS = (
    ("bake", "bakes", "baked", "baked", "rye bread, lemon cake, apple cakes*"),
    ("break", "breaks", "broke", "broken", "thick ice, old chair, wet wood"),
    ("bring", "brings", "brought", "brought", "fresh bread, cold water, red apples*"),
    ("build", "builds", "built", "built", "stone wall, small boat, stone bridge"),
    ("buy", "buys", "bought", "bought", "blue coat, white candles*, fresh eggs*"),
    ("carry", "carries", "carried", "carried", "heavy boxes*, long ladder, cold water"),
    ("catch", "catches", "caught", "caught", "grey horse, fresh fish, small goat"),
    ("choose", "chooses", "chose", "chosen", "best apples*, new song, blue lamp"),
    ("clean", "cleans", "cleaned", "cleaned", "big windows*, garden gate, old clock"),
    ("count", "counts", "counted", "counted", "fresh eggs*, white goats*, gold coins*"),
    ("cut", "cuts", "cut", "cut", "long grass, lemon cake, wet wood"),
    ("draw", "draws", "drew", "drawn", "old tower, stone bridge, grey horse"),
    ("feed", "feeds", "fed", "fed", "hungry hens*, grey horse, white goats*"),
    ("find", "finds", "found", "found", "gold coins*, white goats*, silver key"),
    ("hide", "hides", "hid", "hidden", "silver key, gold coins*, long letter"),
    ("light", "lights", "lit", "lit", "white candles*, old stove, blue lamp"),
    ("mend", "mends", "mended", "mended", "garden gate, old shoes*, small boat"),
    ("paint", "paints", "painted", "painted", "garden gate, old tower, big windows*"),
    ("pick", "picks", "picked", "picked", "ripe pears*, red apples*, wild roses*"),
    ("read", "reads", "read", "read", "long letter, school play, old books*"),
    ("ring", "rings", "rang", "rung", "school bell, brass bells*, church bell"),
    ("sell", "sells", "sold", "sold", "ripe pears*, fresh fish, old books*"),
    ("sing", "sings", "sang", "sung", "new song, old songs*, winter songs*"),
    ("sweep", "sweeps", "swept", "swept", "stone floor, school hall, wet street"),
    ("teach", "teaches", "taught", "taught", "first class, piano class, new sailors*"),
    ("wash", "washes", "washed", "washed", "big windows*, old shoes*, blue coat"),
    ("water", "waters", "watered", "watered", "wild roses*, long grass, lemon tree"),
    ("write", "writes", "wrote", "written", "school play, long letter, new song"),
)

# Things that a person can own, find, lend or sell: (material choices, what it is good for).
THINGS = {
    "bell": ("brass, copper, silver", "call the children, start the class"),
    "boat": ("oak, pine, steel", "catch fish, visit the island"),
    "box": ("leather, pine, tin", "keep old letters, hide gold coins"),
    "chair": ("leather, oak, pine", "read by the fire, rest after lunch"),
    "clock": ("brass, oak, silver", "catch the first train, time the eggs"),
    "coat": ("leather, wool", "walk in the rain, stay warm at sea"),
    "drum": ("copper, oak, tin", "lead the parade, wake the neighbours"),
    "kettle": ("copper, steel, tin", "make hot tea, boil the eggs"),
    "knife": ("copper, silver, steel", "cut the bread, open letters"),
    "ladder": ("oak, pine, steel", "pick ripe pears, clean the windows"),
    "lamp": ("brass, copper, tin", "walk home at night, read in bed"),
    "violin": ("oak, pine", "play old songs, wake the neighbours"),
}
LOOKS = listed("big, broken, heavy, new, old, plain, round, small, strange, tiny")

LANDMARKS = listed("bakery, bank, castle, church, inn, library, market, mill, museum, park, school, station, tower")
FOUND_AT = listed("behind the, in the, near the, outside the")
KEPT_AT = listed(
    "by the fire, by the window, in a box, in the garden, in the kitchen, on a shelf, on the piano, under the bed"
)

# Invented places.
PLACE_STARTS = listed("Al, Bel, Cor, Dal, Fen, Gar, Hol, Mar, Ros, Win")
PLACE_ENDS = listed("by, dale, field, ford, ham, mere, stead, ton")
PLACE_KINDS = listed("farming village, fishing village, market town, mountain village, old town, port, school town")
PLACE_FAME = listed(
    "apple cakes, brass bells, copper lamps, fresh fish, oak boats, rye bread, silver clocks, "
    "stone bridges, wild horses, wild roses, winter market, wool coats"
)

# Timetable entry -> what the person does.
ACTIVITIES = {
    "baking": "bakes bread",
    "chess": "plays chess",
    "choir": "sings in the choir",
    "drawing": "draws horses",
    "football": "plays football",
    "garden": "works in the garden",
    "market": "shops at the market",
    "piano": "plays the piano",
    "running": "runs in the park",
    "sailing": "sails a boat",
    "swimming": "goes swimming",
    "theatre": "acts in a play",
}

# (unit, word for the largest, word for the smallest, range of values, things).
DIMENSIONS = (
    ("kilos", "heaviest", "lightest", (10, 60), "box, chair, clock, drum, goat, ladder, sack, stove"),
    ("years", "oldest", "youngest", (20, 70), "baker, captain, cook, doctor, farmer, nurse, sailor, tailor"),
    ("coins", "dearest", "cheapest", (10, 60), "bell, chair, clock, coat, drum, kettle, lamp, violin"),
    ("miles", "farthest", "nearest", (2, 40), "castle, church, inn, island, market, mill, park, station"),
    ("minutes", "slowest", "quickest", (5, 60), "boat, bus, cart, ferry, horse, plane, taxi, train"),
)

# Countable things for sums.
COUNTABLES = listed("apples, books, buttons, candles, cards, coins, eggs, lemons, letters, nuts, pears, stamps")

# Directions: a step as a note -> the step as it is said; {} is a landmark.
STEPS = {
    "left at {}": "turn left at the {}",
    "right at {}": "turn right at the {}",
    "past {}": "walk past the {}",
    "round {}": "go round the {}",
    "over bridge": "cross the bridge",
    "uphill": "climb the hill",
    "2nd left": "take the second street on the left",
    "2nd right": "take the second street on the right",
    "along river": "follow the river",
    "through gate": "go through the gate",
}

# Favours one can ask for by message.
CHORES = listed(
    "bake my bread, carry my boxes, clean my windows, cut my grass, mend my gate, move my piano, "
    "paint my kitchen, pick my pears, sell my books, sweep my floor"
)
EVENTS = listed("boat race, concert, garden party, school play, tea party, wedding")
PETS = listed("cat, dog, goat, hens, horse, parrot")
# An excuse as the instruction says it -> as the answer says it.
EXCUSES = {
    "you are at work": "I am at work",
    "you are at sea": "I am at sea",
    "you are visiting your aunt": "I am visiting my aunt",
    "you have a cold": "I have a cold",
    "you have guests": "I have guests",
    "you must help your brother": "I must help my brother",
    "you must see your doctor": "I must see my doctor",
    "your train leaves early": "my train leaves early",
}

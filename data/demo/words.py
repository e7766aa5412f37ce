"""The lexicon of the demo rows: everything that `make_rows.py` puts into its sentences.

Plain constants, written for this project. All places are invented (`PLACE_STARTS` + `PLACE_ENDS`),
and so are the people: a first name here stands for nobody.
"""


def listed(text: str) -> tuple[str, ...]:
    """The words of a text that a comma separates."""
    return tuple(text.split(", "))


# First name -> (subject pronoun, possessive).
PEOPLE = {
    **dict.fromkeys(
        listed("Ada, Anna, Clara, Emma, Greta, Hana, Ida, Julia, Lena, Maya, Nora, Olga, Priya, Ruth, Vera, Zoe"),
        ("she", "her"),
    ),
    **dict.fromkeys(
        listed("Adam, Ahmed, Bruno, Chen, David, Emil, Felix, Hugo, Ivan, Karim, Leo, Marco, Omar, Paul, Ravi, Simon"),
        ("he", "his"),
    ),
}

# What a woman or a man can be to somebody.
RELATIONS = {
    "she": listed("aunt, cousin, daughter, friend, grandmother, neighbour, niece, sister, teacher"),
    "he": listed("brother, cousin, friend, grandfather, nephew, neighbour, son, teacher, uncle"),
}

ROLES = listed(
    "baker, captain, carpenter, cook, doctor, farmer, gardener, mayor, miller, nurse, sailor, "
    "shepherd, student, tailor, teacher, weaver"
)
ROLE_ADJECTIVES = listed("busy, careful, clever, kind, new, old, proud, quiet, tired, young")

DAYS = listed("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")

HOURS = listed("one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve")

HABITS = (
    "Every morning",
    "Every evening",
    "Every Friday",
    "Each autumn",
    "Each winter",
    "After breakfast",
    "After supper",
    "At first light",
    "At noon",
    "Before lunch",
    "In early spring",
    "In the holidays",
    "On rainy days",
    "On Sundays",
    "Once a week",
    "Twice a month",
)

MOMENTS = (
    "after the storm",
    "after dark",
    "at midnight",
    "at sunrise",
    "before breakfast",
    "before the feast",
    "during the fair",
    "for the neighbours",
    "for the whole village",
    "in the early morning",
    "in the rain",
    "on market day",
    "with great care",
    "without any help",
)

# (base, third person, past, past participle, objects); an object that ends in "*" is plural.
VERBS = (
    ("bake", "bakes", "baked", "baked", "rye loaf, almond cakes*, apple pie"),
    ("bring", "brings", "brought", "brought", "fresh bread, wooden crates*, cold water"),
    ("build", "builds", "built", "built", "stone wall, beehives*, small bridge"),
    ("buy", "buys", "bought", "bought", "blue cloth, candles*, garden tools*"),
    ("carry", "carries", "carried", "carried", "heavy baskets*, milk, long ladder"),
    ("catch", "catches", "caught", "caught", "silver trout, rabbits*, runaway goat"),
    ("choose", "chooses", "chose", "chosen", "best apples*, winning poem, new flag"),
    ("count", "counts", "counted", "counted", "coins*, lambs*, empty jars*"),
    ("cut", "cuts", "cut", "cut", "long grass, hedges*, birthday cake"),
    ("deliver", "delivers", "delivered", "delivered", "morning post, parcels*, newspapers*"),
    ("draw", "draws", "drew", "drawn", "old harbour, town maps*, church tower"),
    ("feed", "feeds", "fed", "fed", "hens*, grey horse, hungry ducks*"),
    ("find", "finds", "found", "found", "lost sheep, wild berries*, right path"),
    ("grow", "grows", "grew", "grown", "red tulips*, giant pumpkin, sweet peas*"),
    ("hang", "hangs", "hung", "hung", "wet sheets*, paper lamps*, oak sign"),
    ("hide", "hides", "hid", "hidden", "silver key, presents*, gold ring"),
    ("light", "lights", "lit", "lit", "street lamps*, kitchen stove, signal fire"),
    ("mend", "mends", "mended", "mended", "torn net, old shoes*, broken fence"),
    ("paint", "paints", "painted", "painted", "garden gate, shutters*, fishing boat"),
    ("pick", "picks", "picked", "picked", "black cherries*, ripe figs*, wild mint"),
    ("plant", "plants", "planted", "planted", "young trees*, winter barley, onions*"),
    ("read", "reads", "read", "read", "weekly news, love letters*, sea chart"),
    ("repair", "repairs", "repaired", "repaired", "village pump, bicycles*, leaking roof"),
    ("ring", "rings", "rang", "rung", "church bell, school bell, brass bells*"),
    ("sell", "sells", "sold", "sold", "ripe pears*, last melon, goat cheese"),
    ("sing", "sings", "sang", "sung", "old song, folk tunes*, winter hymn"),
    ("sweep", "sweeps", "swept", "swept", "yard, stone stairs*, wide hall"),
    ("teach", "teaches", "taught", "taught", "youngest class, new rowers*, piano class"),
    ("tell", "tells", "told", "told", "ghost story, funny stories*, whole truth"),
    ("throw", "throws", "threw", "thrown", "fishing net, heavy stones*, leather ball"),
    ("wash", "washes", "washed", "washed", "raw wool, dishes*, muddy boots*"),
    ("water", "waters", "watered", "watered", "roses*, bean field, lemon tree"),
    ("write", "writes", "wrote", "written", "school play, invitations*, long letter"),
)

# Things that a person can own: (material choices, what it is used for).
BELONGINGS = {
    "bell": ("brass, copper, silver", "call the children home, start the morning lesson"),
    "boat": ("oak, pine, steel", "fish on the lake, carry sheep across the bay, visit the islands"),
    "box": ("cedar, leather, tin", "keep old letters, store coloured buttons, hide sweets"),
    "chair": ("cane, oak, willow", "rest by the window, read beside the fire"),
    "clock": ("brass, marble, walnut", "time the morning train, wake before sunrise"),
    "coat": ("felt, leather, wool", "stay warm at sea, walk in the snow"),
    "drum": ("birch, copper, tin", "lead the village parade, wake the whole street"),
    "kettle": ("copper, iron, steel", "make mint tea, boil water on the beach"),
    "knife": ("bone, silver, steel", "carve toy animals, peel apples for jam"),
    "ladder": ("ash, bamboo, steel", "pick cherries, clean the high windows"),
    "lantern": ("brass, glass, tin", "walk home at night, signal passing ships"),
    "violin": ("cedar, maple, walnut", "play at weddings, practise folk tunes"),
}
LOOKS = listed("broad, carved, crooked, dented, elegant, heavy, large, old, painted, plain, round, small, sturdy, tiny")

# Things that turn up in stories.
FINDS = listed("bag, book, camera, coin, comb, compass, flute, hat, key, map, pipe, purse, ring, scarf, umbrella")
FIND_ADJECTIVES = listed("broken, green, heavy, old, red, silver, strange, tiny, wet, white, yellow")
FOUND_AT = (
    "at the bus stop",
    "behind the school",
    "beside the river",
    "by the old well",
    "in a hollow tree",
    "in the long grass",
    "near the harbour",
    "on the beach",
    "on the night train",
    "outside the bakery",
    "under a park bench",
    "under the bridge",
)
KEPT_AT = (
    "above the fireplace",
    "beside the bed",
    "in a glass case",
    "in a kitchen drawer",
    "in a wooden chest",
    "in the attic",
    "in the cellar",
    "on a high shelf",
    "on the piano",
    "under the stairs",
)

# Invented places.
PLACE_STARTS = listed("Al, Bel, Cor, Dal, Fen, Gar, Hol, Mar, Ol, Ros, Ver, Win")
PLACE_ENDS = listed("by, den, field, ford, ham, mere, ness, stead, ton, well")
PLACE_KINDS = listed(
    "farming village, fishing village, harbour town, market town, mining town, mountain village, "
    "railway town, university town, walled city"
)
PLACE_FAME = listed(
    "apple cider, black cheese, blue glass, brass clocks, cherry trees, ginger cake, hot springs, "
    "leather shoes, music festival, old windmills, paper lanterns, puppet theatre, rose gardens, "
    "smoked eel, stone bridges, wild horses"
)

# Timetable entry -> what the person does.
ACTIVITIES = {
    "ballet": "dances ballet",
    "chess": "plays chess",
    "choir": "sings in the choir",
    "drawing": "draws portraits",
    "football": "plays football",
    "garden": "works in the garden",
    "guitar": "plays the guitar",
    "market": "shops at the market",
    "piano": "practises the piano",
    "pottery": "makes pots",
    "rowing": "rows on the river",
    "running": "runs in the park",
    "Spanish": "studies Spanish",
    "swimming": "goes swimming",
    "theatre": "acts in a play",
    "yoga": "does yoga",
}

# (unit, word for the largest, word for the smallest, range of values, things).
DIMENSIONS = (
    (
        "kilos",
        "heaviest",
        "lightest",
        (8, 90),
        "anvil, barrel, crate, goat, pumpkin, sack, statue, stove, trunk",
    ),
    ("metres", "tallest", "shortest", (5, 60), "birch, chimney, crane, elm, hotel, mast, oak, pine, tower"),
    (
        "years",
        "oldest",
        "youngest",
        (18, 99),
        "captain, cook, donkey, farmer, nurse, parrot, tailor, tortoise",
    ),
    (
        "coins",
        "dearest",
        "cheapest",
        (4, 80),
        "basket, blanket, bonnet, carpet, lamp, mirror, pipe, saddle, vase",
    ),
    (
        "miles",
        "farthest",
        "nearest",
        (2, 70),
        "abbey, beach, castle, cave, forest, island, lake, mine, volcano",
    ),
    ("minutes", "slowest", "quickest", (3, 90), "bus, canoe, ferry, horse, plane, raft, sledge, taxi, tram"),
)

# Countable things for sums.
COUNTABLES = listed(
    "acorns, apples, beads, books, buttons, candles, cards, coins, eggs, figs, feathers, lemons, "
    "marbles, nuts, pears, pencils, plums, postcards, shells, stamps, stickers, tickets"
)

# Directions: a step as a note -> the step as it is said; {} is a landmark.
LANDMARKS = listed(
    "bakery, bank, castle, chapel, cinema, fountain, hospital, inn, library, market, mill, "
    "museum, park, school, station, theatre"
)
STEPS = {
    "left at {}": "turn left at the {}",
    "right at {}": "turn right at the {}",
    "past {}": "walk past the {}",
    "round {}": "go round the {}",
    "over bridge": "cross the bridge",
    "uphill": "climb the hill",
    "2nd left": "take the second street on the left",
    "2nd right": "take the second street on the right",
    "3rd left": "take the third street on the left",
    "3rd right": "take the third street on the right",
    "along canal": "follow the canal",
    "through gate": "pass through the gate",
}

# Favours one can ask for by message.
LENDABLES = listed(
    "big tent, camera, cookbook, drill, folding table, garden hose, guitar, ladder, road map, rowing boat, toolbox, van"
)
CHORES = listed(
    "carry my sofa, clean my windows, cut my hedge, fix my printer, load my van, move my "
    "piano, pack my books, paint my kitchen, pick my plums, repair my bicycle, sweep my "
    "chimney, translate my letter"
)
EVENTS = listed(
    "birthday lunch, book club, boat race, concert, garden party, picnic, quiz night, school play, tea party, wedding"
)
PETS = listed("cat, dog, goldfish, hamster, parrot, pony, puppy, rabbits, tortoise")
# An excuse as the instruction says it -> as the answer says it.
EXCUSES = {
    "you are at work": "I am at work",
    "you are moving house": "I am moving house",
    "you are on holiday": "I am on holiday",
    "you are visiting your aunt": "I am visiting my aunt",
    "you have a cold": "I have a cold",
    "you have an exam": "I have an exam",
    "you have guests": "I have guests",
    "you must see your dentist": "I must see my dentist",
    "you must mind your children": "I must mind my children",
    "you promised to help your brother": "I promised to help my brother",
    "your train leaves early": "my train leaves early",
    "your car is being repaired": "my car is being repaired",
}

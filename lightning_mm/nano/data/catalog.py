"""Which emoji depict a thing, what it is called, and to which of six categories it belongs: chosen by eye.

Data flow: ``openmoji`` looks each entry up by its CLDR name; ``splits`` keeps a group in one split.

One entry is ``[mark] CLDR name [= name we use] [@ group]``, separated by commas. Marks: ``~`` a mass noun ("bread"),
``*`` a plural noun ("grapes"). The group defaults to the last word of the name. A group holds what could be taken for
one another, in a picture or in a question: its members never share a scene, are never the wrong answer to each other,
and all stay in one split. ``OTHER`` things are named, counted and found, but never asked for a category.
Pictures that hold a second thing of the catalogue (the hammer on the toolbox, the cheese in the trap) are left out.

A thing that can stand in a picture: its cut-out, its name, and what is true of it.

Data flow: ``openmoji`` and ``stamps`` make Things; ``splits`` shares them out; ``studio`` draws them; ``questions``
asks about them.
Legend: a cut-out is an RGBA picture cropped to what is not transparent.
"""

import re
from dataclasses import dataclass
from typing import Literal

from PIL import Image

Number = Literal["one", "many", "mass"]
OTHER = "other"
UNASKED = (OTHER, "clothing", "plant")
"""Categories with too few drawings, or none, to be asked for."""
CATEGORIES = ("animal", "food", "vehicle", "household", "clothing", "plant")

CATALOGUE = {
    "animal": """
        monkey, monkey face=monkey, gorilla, orangutan @gorilla, dog, dog face=dog, poodle @dog, wolf, fox, raccoon,
        cat, cat face=cat, lion, tiger, tiger face=tiger, leopard, horse, horse face=horse, donkey @horse,
        zebra @horse, deer, moose @deer, bison @cow, ox @cow, water buffalo @cow, cow, cow face=cow, pig,
        pig face=pig, boar @pig, ram @sheep, ewe=sheep, goat @sheep, camel, two-hump camel=camel, llama, giraffe,
        elephant, mammoth @elephant, rhinoceros, hippopotamus, mouse, mouse face=mouse, rat @mouse, hamster @mouse,
        rabbit, rabbit face=rabbit, chipmunk, beaver, hedgehog, bat, bear, polar bear, panda @bear, koala, sloth,
        otter, skunk, kangaroo, badger, turkey, chicken, rooster @chicken, baby chick=chick @chicken, penguin, dove,
        eagle, duck, goose @duck, swan @duck, owl, dodo, flamingo, peacock, parrot, frog, crocodile, turtle, lizard,
        snake, whale, spouting whale=whale, orca @whale, dolphin, seal, fish, tropical fish,
        blowfish=pufferfish @fish, shark @fish, octopus, jellyfish, snail, butterfly, ant, honeybee=bee, beetle,
        lady beetle=ladybug @beetle, cricket, cockroach @beetle, spider, scorpion, mosquito @fly, fly, worm,
        sauropod=dinosaur, T-Rex=dinosaur""",
    "food": """
        *grapes, melon, watermelon @melon, tangerine=orange, lemon, lime @lemon, banana, pineapple, mango,
        red apple=apple, green apple=apple, pear, peach, strawberry, *blueberries, kiwi fruit=kiwi,
        tomato, coconut, avocado, eggplant, potato, carrot, ear of corn @corn, hot pepper=chili pepper, bell pepper,
        cucumber, ~broccoli, ~garlic, onion, peanuts=peanut, chestnut, pea pod, olive, bread=loaf of bread @bread,
        baguette bread=baguette @bread, croissant, pretzel, bagel, *pancakes, waffle, ~cheese wedge=cheese,
        ~meat on bone=meat, poultry leg @meat, cut of meat=steak @meat, ~bacon @meat, hamburger,
        *french fries=fries, pizza=slice of pizza @pizza, hot dog @hot dog, sandwich, taco, burrito, egg,
        cooking=fried egg, ~green salad=salad, ~popcorn, ~butter, rice ball @rice, cooked rice=bowl of rice @rice,
        ~spaghetti, ~sushi, dumpling, cookie, ~soft ice cream=ice cream, ~ice cream, doughnut, birthday cake,
        shortcake=piece of cake @cake, cupcake @cake, pie, chocolate bar @chocolate, ~candy, lollipop,
        custard=pudding""",
    "vehicle": """
        locomotive=train, high-speed train, bullet train, train, metro=train, tram @train, light rail=train,
        tram car=tram @train, monorail @train, bus, oncoming bus=bus, trolleybus @bus, minibus=van, ambulance @van,
        fire engine=fire truck, police car, oncoming police car=police car, taxi @car, oncoming taxi=taxi @car,
        automobile=car, oncoming automobile=car, sport utility vehicle=car, racing car, pickup truck,
        delivery truck=van, articulated lorry=truck, tractor, motorcycle, motor scooter @motorcycle,
        kick scooter @kick scooter, bicycle, auto rickshaw=rickshaw, sailboat @boat, canoe @boat, speedboat @boat,
        motor boat, passenger ship=ship @boat, ferry @boat, ship @boat, airplane, small airplane=airplane,
        helicopter, rocket, mountain cableway=cable car @cable car""",
    "household": """
        door @house, mirror, bed, chair, toilet, plunger, bathtub, razor, safety pin, broom, basket,
        roll of paper=roll of paper @paper roll, bucket, ~soap, toothbrush, sponge, fire extinguisher, candle,
        light bulb, flashlight, red paper lantern=lantern @lamp, diya lamp, telephone,
        telephone receiver @telephone, mobile phone=phone @telephone, battery, electric plug, laptop @computer,
        desktop computer, printer, keyboard @computer, television @computer, camera, video camera, radio,
        alarm clock, mantelpiece clock=clock, timer clock=timer @clock, hourglass done=hourglass,
        closed umbrella=umbrella, umbrella, magnifying glass tilted left=magnifying glass @magnifying glass,
        closed book=book, newspaper, envelope, package=box @box, pencil, pen @pencil, fountain pen @pencil,
        paintbrush @pencil, crayon @pencil, briefcase, clipboard, pushpin, paperclip, straight ruler=ruler,
        triangular ruler=ruler, *scissors, wastebasket=trash can @trash can, locked=lock, key, old key, hammer, axe,
        wrench, screwdriver, carpentry saw=saw, ladder, magnet, sewing needle,
        thread=spool of thread @thread, yarn=ball of yarn @yarn, teapot, spoon, kitchen knife=knife, *chopsticks,
        jar, baby bottle, framed picture, lotion bottle""",
    "clothing": """
        *glasses, *sunglasses @glasses, lab coat, coat, safety vest=vest, t-shirt @shirt,
        running shirt=tank top @shirt, *jeans, scarf, *gloves, *socks, dress, kimono, sari,
        one-piece swimsuit=swimsuit, bikini @swimsuit, *briefs=underpants, *shorts, woman’s clothes=blouse @shirt,
        man’s shoe=shoe, running shoe=sneaker @shoe, hiking boot=boot @shoe, flat shoe, high-heeled shoe,
        woman’s sandal=sandal @shoe, woman’s boot=boot @shoe, thong sandal=flip-flop @shoe,
        ballet shoes=ballet shoe, woman’s hat=hat, top hat, billed cap=cap @hat, graduation cap @hat,
        rescue worker’s helmet=helmet, military helmet, martial arts uniform=judo suit""",
    "plant": """
        seedling, potted plant, evergreen tree, deciduous tree=tree, palm tree, leafless tree=bare tree, cactus,
        tulip, cherry blossom, rose, wilted flower=wilted rose, hibiscus, sunflower, hyacinth, lotus,
        sheaf of rice=rice plant @rice plant, herb, four leaf clover @clover, shamrock @clover, maple leaf""",
    OTHER: """
        saxophone, guitar, banjo @guitar, trumpet, trombone @trumpet, violin, drum, long drum, *maracas, flute,
        harp, accordion, soccer ball, baseball @ball, basketball @ball, volleyball @ball,
        american football=football @ball, boxing glove @gloves, trophy, sled, skateboard, roller skate, ice skate,
        yo-yo, kite, boomerang, parachute, balloon, teddy bear, wrapped gift=gift, ring, crown, watch @clock,
        stopwatch @clock, backpack @bag, handbag @bag, purse @bag, bell, castle @house, house, church @house, tent,
        factory @house, mountain, volcano @mountain, rainbow, anchor, gem stone=diamond, syringe, pill, microscope,
        telescope, stethoscope, bomb, bone @meat, tooth, mushroom, crab @lobster, lobster, squid @octopus,
        hot beverage=cup of coffee @cup, teacup without handle=cup of tea @cup, glass of milk @glass,
        wine glass=glass of wine @glass, cocktail glass=cocktail @glass, tropical drink=cocktail @glass,
        beer mug=mug of beer @beer, ~bubble tea @bubble tea,
        cup with straw=soft drink, robot, ghost, sun, crescent moon=moon, snowflake, cloud, microphone,
        studio microphone=microphone, trident emblem=trident, dagger @sword, shield, shopping cart,
        military medal=medal, sports medal=medal, puzzle piece""",
}  # fmt: skip

NO_COLOUR = frozenset((
    "cooking", "speedboat", "motor boat", "fly", "soccer ball", "microphone", "studio microphone", "peacock", "burrito",
))  # fmt: skip
"""CLDR names of those whose dominant colour is not the one people would say: the pan of the fried egg, the water
under the boat."""


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue: where the picture is found (CLDR name), and how we speak of it."""

    cldr: str
    name: str
    category: str
    group: str
    number: Number


def entries() -> tuple[Entry, ...]:
    """Every entry, in the order written."""
    return tuple(
        _parse(" ".join(text.split()), category) for category, block in CATALOGUE.items() for text in block.split(",")
    )


def _parse(text: str, category: str) -> Entry:
    match = re.fullmatch(r"([~*]?)([^=@]+)(?:=([^@]+))?(?:@(.+))?", text)
    assert match, text
    mark, cldr, name, group = (part and part.strip() for part in match.groups())
    name = name or cldr
    number: Number = "mass" if mark == "~" else "many" if mark == "*" else "one"
    return Entry(cldr, name, category, group or name.split()[-1], number)


@dataclass(frozen=True, eq=False)
class Thing:
    """One thing to draw and to ask about.

    Args:
        key: Unique, and where the picture came from: ``openmoji:1F408``, ``stamps:animals/cat``.
        name: What we call it, in the singular unless ``number`` says otherwise.
        category: One of ``catalogue.CATEGORIES``, or ``other``; a continent for flags.
        group: Things of one group are never told apart and never cross a split.
        number: Grammar of the name: countable, plural only, or mass.
        cutout: The picture, cropped.
        colour: The name of the one colour that dominates it, else None.
    """

    key: str
    name: str
    category: str
    group: str
    number: Number
    cutout: Image.Image
    colour: str | None = None

    @property
    def source(self) -> str:
        """The collection it was taken from, for the licence note."""
        return self.key.partition(":")[0]


def cropped(picture: Image.Image) -> Image.Image | None:
    """The part of an RGBA picture that is not transparent; None where all of it is."""
    box = picture.getchannel("A").point(lambda alpha: 255 if alpha > 16 else 0).getbbox()
    return picture.crop(box) if box else None

"""Catalog of emoji that depict a nameable thing, with name and category, chosen by hand.

An entry is ``[mark] CLDR name [= our name] [@ group]``, separated by commas. Marks: ``~`` a mass noun ("bread"), ``*``
a plural noun ("grapes"). The group defaults to the last word of the name. A group holds things that could be confused
in an image or a question: they are never in one scene, never the wrong answer to each other, and all in one split.
``OTHER`` things are named, counted and located, but never asked for a category. Emoji that show a second thing of the
catalog (the hammer on the toolbox, the cheese in the trap) are left out.

Data flow: ``entries`` -> ``hands`` (cut-outs by CLDR name) -> ``Thing`` -> ``splits`` -> ``images``.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from PIL import Image

from lightning_mm.nano.data.colors import dominant_color, mean_color

Number = Literal["one", "many", "mass"]
OTHER = "other"
UNASKED = (OTHER, "clothing", "plant")
"""Categories with too few things, or none, to be asked for."""
CATEGORIES = ("animal", "food", "vehicle", "household", "clothing", "plant")

CATALOG = {
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

NO_COLOR = frozenset((
    "cooking", "speedboat", "motor boat", "fly", "soccer ball", "microphone", "studio microphone", "peacock", "burrito",
))  # fmt: skip
"""CLDR names of emoji whose dominant color is not that of the thing (the pan of the fried egg, the water of a boat)."""


@dataclass(frozen=True)
class Entry:
    """One entry of the catalog: CLDR name of the emoji, and name, category, group and number of the thing."""

    cldr: str
    name: str
    category: str
    group: str
    number: Number


def entries() -> tuple[Entry, ...]:
    """Every entry, in the order of the catalog."""
    return tuple(
        _parse(" ".join(text.split()), category) for category, block in CATALOG.items() for text in block.split(",")
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
    """A thing that can be drawn and asked about.

    Args:
        key: Unique key with the hand that drew it: ``openmoji:1F408``, ``stamps:animals/cat``.
        name: Name, singular unless ``number`` is ``many``.
        category: One of ``CATEGORIES`` or ``other``; the continent for flags.
        group: Things of one group are never told apart and are all in one split.
        number: Countable (``one``), plural only (``many``) or mass noun (``mass``).
        draw: Draws it: an RGBA image, cropped to what is not transparent.
        colored: Whether the dominant color of the cut-out, if there is one, is that of the thing.
    """

    key: str
    name: str
    category: str
    group: str
    number: Number
    draw: Callable[[], Image.Image]
    colored: bool = True

    @property
    def source(self) -> str:
        """The hand that drew it, for the split and the license note."""
        return self.key.partition(":")[0]

    @cached_property
    def cutout(self) -> Image.Image:
        """The RGBA image, drawn once."""
        return self.draw()

    @cached_property
    def color(self) -> str | None:
        """Name of the dominant color; None where there is none."""
        return dominant_color(self.cutout) if self.colored else None

    @cached_property
    def mean(self) -> tuple[float, float, float]:
        """Mean RGB of what is not transparent."""
        return mean_color(self.cutout)


def crop_transparent(image: Image.Image) -> Image.Image | None:
    """The part of an RGBA image that is not transparent; None where all of it is."""
    box = image.getchannel("A").point(lambda alpha: 255 if alpha > 16 else 0).getbbox()
    return image.crop(box) if box else None

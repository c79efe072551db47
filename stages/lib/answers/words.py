"""The words that may stand beside a number: units with their sizes, scales, numbers as words, things, plain words.

An answer is read as a number only if every word around it stands here, so no unknown word can change its meaning
(`5 lakh` is read, `5 Dutzend` and `loss of 5` are not). A word missing here costs a right answer. A word that scales,
turns or denies a number must not be in `PLAIN` or `THINGS`: a wrong answer would be rewarded.
"""
# ruff: noqa: RUF001  words and signs of other languages

from fractions import Fraction
from typing import NamedTuple


class Unit(NamedTuple):
    """A unit of a number; those of one `kind` convert into each other by `size`."""

    kind: str
    size: Fraction = Fraction(1)


def _units() -> dict[str, Unit]:
    table: dict[str, Unit] = {}
    for kind, spelled in _SIZES.items():
        for line in spelled.split(";"):
            size, *names = line.split()
            table |= dict.fromkeys(names, Unit(kind, Fraction(size)))
    return table


# A kind of unit: for each size, in the kind's first unit, the ways to write it. Lower case but for symbols.
_SIZES = {
    "m": "1 m metre metres meter meters mtr 米 미터; 1/1000 mm millimetre millimetres millimeter millimeters 毫米;"
    "1/100 cm centimetre centimetres centimeter centimeters 厘米 センチ; 1/10 dm decimetre decimeter decimeters;"
    "1000 km kms kilometre kilometres kilometer kilometers 公里 千米 キロ; 127/5000 inch inches; 381/1250 ft foot feet;"
    "1143/1250 yd yds yard yards; 201168/125 mi mile miles",
    "g": "1 g gram grams gramme grammes gm 克 グラム; 1/1000 mg milligram milligrams;"
    "1000 kg kgs kilo kilos kilogram kilograms 公斤 千克; 1000000 tonne tonnes",
    "lb": "1 lb lbs pound pounds; 1/16 oz ounce ounces; 2000 ton tons",
    "s": "1 s sec secs second seconds 秒 초; 60 min mins minute minutes minuten minutos 分钟 分間;"
    "3600 h hr hrs hour hours stunde stunden heures horas 小时 小時 時間 시간;"
    "86400 day days tag tage jours días dias 天;"
    "604800 week weeks wk wks wochen",
    "month": "1 month months mo mos monate 个月;"
    "120 decade decades; 1200 century centuries; 12 year years yr yrs jahr jahre ans años anos 年 岁 歳 살",
    "L": "1 L l liter liters litre litres 升 リットル; 1/1000 ml mL milliliter milliliters millilitre millilitres 毫升;"
    "1/100 cl cL; 1/10 dl dL",
    "cup": "1 cup cups; 2 pint pints pt pts; 4 quart quarts qt qts; 16 gallon gallons gal gals",
    "tbsp": "1 tbsp tablespoon tablespoons; 1/3 tsp teaspoon teaspoons",
    "$": "1 $ ＄ us$ usd dollar dollars buck bucks; 1/100 ¢ cent cents penny pennies",
    "€": "1 € eur euro euros", "£": "1 £ gbp; 1/100 pence", "¥": "1 ¥ jpy cny yen yuan rmb 元 円 圆 块 日元 人民币",
    "₹": "1 ₹ rs inr rupee rupees; 1/100 paise", "won": "1 won ₩ krw 원", "peso": "1 peso pesos mxn",
    "franc": "1 franc francs chf", "kr": "1 kr sek nok dkk krona kronor kroner",
    "rub": "1 rub ₽ ruble rubles руб рублей рубля",
    "%": "1 % percent pct prozent", "°": "1 ° deg degs degree degrees", "°C": "1 °C celsius centigrade",
    "°F": "1 °F fahrenheit", "rad": "1 rad radian radians", "W": "1 W watt watts; 1000 kW kilowatt kilowatts",
    "J": "1 J joule joules; 1000 kJ", "N": "1 N newton newtons", "V": "1 V volt volts", "A": "1 A amp amps amperes",
    "Hz": "1 Hz hertz; 1000 kHz; 1000000 MHz", "kWh": "1 kWh kwh", "cal": "1 cal calorie calories; 1000 kcal",
    "ha": "1 ha hectare hectares", "acre": "1 acre acres", "rpm": "1 rpm",
    "byte": "1 byte bytes; 1000 KB kB; 1000000 MB; 1000000000 GB; 1000000000000 TB", "bit": "1 bit bits",
    "thing": "1 个 個 人 名 本 只 隻 匹 头 頭 条 张 枚 台 辆 朵 棵 颗 개 명 마리 권 대 장 шт",
}  # fmt: skip
UNITS = _units()
MONEY = frozenset("$ € £ ¥ ₹ won peso franc kr rub".split())  # kinds
CURRENCIES = {name for name, unit in UNITS.items() if unit.kind in MONEY}
LENGTHS = {name for name, unit in UNITS.items() if unit.kind == "m"}

SCALES = {
    "dozen": 12, "hundred": 100, "thousand": 10**3, "lakh": 10**5, "lakhs": 10**5, "million": 10**6, "crore": 10**7,
    "crores": 10**7, "billion": 10**9, "trillion": 10**12,
}  # fmt: skip
SHORT_SCALES = {"k": 10**3, "m": 10**6, "mn": 10**6, "b": 10**9, "bn": 10**9}  # 1.2k; the others after a currency only
CARDINALS = {word: value for value, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen".split()
)}  # fmt: skip
CARDINALS |= dict(zip("twenty thirty forty fifty sixty seventy eighty ninety".split(), range(20, 100, 10), strict=True))
PARTS = dict(
    zip("third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split(), range(3, 13), strict=True)
)
PARTS |= {"half": 2, "quarter": 4, "sixteenth": 16, "twentieth": 20, "hundredth": 100, "thousandth": 1000}

HEDGES = frozenset("about approximately approx around roughly circa ca maybe perhaps probably possibly".split())

# Words that do not change a number, wherever they stand in the sentence.
PLAIN = frozenset(
    """
    a an the this that these those it he she they we you i its his her their our your my him them us me is are was
    were be been being will would should must can could do does did and in of for to at on with as so then thus
    therefore hence finally now here there ans answer answers final result results solution total totals sum value
    values number numbers amount count quantity altogether overall together all each both whole entire other same
    exactly precisely just only simply correct right equal equals gives give makes make made get gets got have has
    had having need needs needed want wants go goes went going come comes came take takes took taken use uses used
    spend spends spent pay pays paid earn earns earned sell sells sold buy buys bought cost costs costing eat eats
    ate eaten drink drinks drank read reads write writes wrote run runs ran walk walks walked drive drives drove
    travel travels traveled work works worked see sees saw find finds found receive receives received save saves
    saved collect collects collected bake bakes baked pick picks picked plant plants planted scored know knows hold
    holds held contain contains contained remain remains remaining live lives lived price distance length width
    height area volume perimeter speed rate time age weight mass profit revenue income salary change temperature
    average mean median mode probability fraction percentage angle radius diameter extra additional own good antwort
    lösung ergebnis lautet beträgt ist sind hat es die der das insgesamt jibu ni elle il tiene son réponse est la le
    respuesta el ответ 答案 答案是 是 为 答え 答えは です 답 정답
    """.split()
)
# Words of which the same is true, but not at once before a number: `every 4`, `how many 4`, `since 4`, `the red 4`.
APART = frozenset(
    """
    which who when where how many much what because since while every sq big small large little red blue green
    yellow white black orange brown pink purple old fresh long wide tall high deep heavy hot cold full empty
    different such new
    """.split()
)
# Words that do not change a number before them: `5 more`, while `more than 5` is another number.
AFTER = frozenset("more left still away ahead later earlier again today tomorrow already also too".split())
NAMES = frozenset(
    """
    adam alex alice amy andrew andy anna anne anthony ben betty bill billy bob bobby brian carl carla carlos carol
    charlie chris cindy claire dan daniel dave david dean diana donna ed ella emily emma eric eva eve frank fred
    gary george grace greg hannah harry helen henry jack jacob jake james jane janet jason jeff jen jennifer jenny
    jerry jessica jill jim jimmy joe john johnny jordan jose joseph josh joy juan julia julie karen kate katie kelly
    ken kevin kim kyle larry laura lee leo linda lisa lily lucy luke maria marie mark martha martin mary matt max
    megan melissa mia michael mike molly nancy natalia nick nina noah olivia oscar pam pat paul pedro peter phil
    rachel ralph randy ray rebecca richard rick rob robert roger ron rosa rose roy ruth ryan sally sam samantha
    sandy sara sarah scott sean seth sharon sophia stacy stephanie steve steven sue susan tanya ted terry tim tina
    toby tom tommy tony tracy travis tyler uli vanessa victor wendy weng will william zoe betsy
    """.split()
)

# What is counted, in the singular.
THINGS = frozenset(
    """
    animal ant apple apricot aquarium arrow article baby backpack bag bagel baker ball balloon banana band bar
    barrel basket basketball bat bath bead bean bear bed bee beer bicycle bike bill bird birthday biscuit blanket
    block blouse board boat bonus book booklet bookmark bottle bouquet bowl box boy bracelet branch brand bread
    brick bridge brother brownie brush bucket bug building bulb bunch bundle bun bus bush butterfly button cabin
    cabbage cage cake calf call camel camera camper can candle candy cap car card cardboard carpet carrot carton
    case cat caterpillar cent chair chapter cherry chick chicken child chip chocolate cigarette circle city class
    classmate classroom client clip clock clove coat cob coconut coin color colour column comic computer cone
    container contestant cookie corner couch country cousin cow crab cracker crate crayon creature crop cucumber
    cupcake customer daisy dancer daughter deck deer delivery desk diamond dime dinner dinosaur dish doctor dog doll
    dolphin donkey donut doughnut door dragon drawer drawing dress drink driver drop duck ear earring edge egg
    elephant employee engine engineer envelope episode eraser error event exam exercise eye face factory family fan
    farm farmer feather fence field file film finger firefighter fish flag floor flower fly folder fork fountain fox
    friend frog fruit game garden ghost gift giraffe girl glass glasses glove goal goat goose grade grape grandchild
    grain group guest guitar guppy gumball gym hamburger hammer hamster hand handful hat head hen hill hive hole
    holiday home horse hospital hotel house hurdle ice icecream image insect inhabitant invitation island item
    jacket jar jelly jellybean job joke journal jug juice key kid kite kitten knight knot lamb lamp lap lawn laptop
    layer leaf leg lemon lesson letter level library light lime line lion list load lobster loaf lollipop lot lunch
    machine magazine magnet man map marble marker mask mat match mattress meal medal meeting member message milk
    mistake mode monkey morning mosquito mountain mouse mouth movie mug mushroom nail napkin necklace neighbor
    neighbour nest net nickel night nightstand note notebook novel nurse nut object ocean office onion orange orchid
    order outfit owl ox package packet pad page paint painting pair pan pancake pant panel paper parent park part
    participant party passenger path patient pattern pea peach peacock peanut pear pearl pebble pen pencil penguin
    people pepper person pet petal phone photo photograph piano picture pie piece pig pigeon pile pillow pill pilot
    pineapple pizza place plane planet plant plate play player plum pocket poem point pole pond pony pool post
    poster pot potato pouch prawn present prize problem product program project pumpkin pupil puppy purse puzzle
    question quilt rabbit race radio rat recipe record ribbon rice ring river road robot rock roll room rope rose
    round row rug ruler runner sack salad sandwich sandwiche scarf school scientist scoop screw sea seashell season
    seat section seed seedling serving sheep sheet shelf shell ship shirt shoe shoelace shop shot side sister site
    sketch slice slide sloth slot snack snail snake sock soda soldier son song souvenir spider spoon sport spot
    square squirrel stage stair stall stamp star station stick sticker stone store story strawberry straw street
    string student suit suitcase sweater swimmer symbol table tank task taxi tea teacher team tent term test theater
    thing ticket tie tiger tile tire toddler toe tomato tool tooth tour towel tower town toy track tractor train
    tray treat tree triangle trip trophy truck tub tulip turkey turn turtle unit vacation van vase vegetable vehicle
    video villager vine visit visitor volunteer vote wall water watermelon way week weekend wheel whale window
    winner wing wizard wolf woman word worker workout worm yogurt zebra zone t-shirt half-cup ice-cream tennis
    children men women feet teeth mice geese knives lives loaves leaves wolves calves shelves dice sheep oxen times
    occasion occurrence step stop guess attempt try cell lego domino chess piece permutation combination arrangement
    choice option possibility subset solution factor digit vertex vertices face side diagonal point pixel move shift
    session degree vial dose flour sugar butter market pcs pc pommes manzanas äpfel 個です capsule tablet bracket album
    app beverage burger brush cherry clip cracker diaper fry hotdog jean kayak litter ounce portion pound quest rack
    rental sale sample scene sentence shopper skirt sprinkle stack stem stitch subscriber sweet tadpole tourist
    tourists trailer tricycle user wagon
    """.split()
)


def find_unit(word: str) -> Unit | None:
    """Return the unit of a number before `word`, or None for a word that is neither unit nor thing.

    Symbols are looked up as written, words in lower case; a thing is named by its singular.
    """
    unit = UNITS.get(word) or (UNITS.get(word.lower()) if len(word) > 1 else None)
    if unit:
        return unit
    word = word.lower()
    *adjectives, noun = word.split("-")
    if not all(part in PLAIN or part in APART or part in THINGS or len(part) == 1 for part in adjectives):
        noun = word
    for ending, singular in (("", ""), ("s", ""), ("es", ""), ("ies", "y"), ("ves", "f")):
        for counted in (word, noun):
            if counted.endswith(ending) and counted[: len(counted) - len(ending)] + singular in THINGS:
                return Unit(counted[: len(counted) - len(ending)] + singular)
    return None

"""The words by which captions.py tells a side from another sense, in lower case, and how a caption is cut into words."""

from __future__ import annotations

import re

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\s+|\d+|.", re.DOTALL)
OCCURRENCE = re.compile(r"(left|right)((?:most|wards?|hand|handed|hander|handers|side|y)?)(['’]s)?", re.IGNORECASE)
SIDE = re.compile("left|right")


def split(caption: str) -> list[str]:
    """Words, numbers, runs of white space and single signs; joined again they are the caption."""
    return _WORD.findall(caption)


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What stands before or after a side.
OWNERS = _set("the his her its their my your our a this that each one both either teh hte")
PLACES = _set(
    "top bottom upper lower far mid middle center centre front back rear near nearest immediate extreme outer inner hind very "
    "direct furthest farthest further"
)
PICTURES = _set("stage screen camera frame image picture photo photograph")
VIEWS = _set("stage screen camera frame house")  # "stage left", "camera right"
AFTER_PLACE = _set("top bottom upper lower center centre middle foreground background")
BEFORE = _set("on to at from toward towards in into off along near")
SURE_BEFORE = _set("on to from toward towards off")
ORDINALS = _set("first second third fourth fifth sixth seventh eighth last st nd rd th")
MOTIONS = _set(
    "facing faces face faced looking looks look looked turning turned turns turn pointing points point pointed heading "
    "headed heads head moving moves move moved walking walks walk running runs run leaning leans lean leant tilting tilted "
    "tilts bending bends bent swinging flying flies sailing sails driving drives going goes traveling travelling travels "
    "veering veers curving curves gazing gazes gaze glancing glances staring stares angled shifted rotated slightly forking "
    "forks swerving swerves"
)
BEARINGS = _set(  # motions after which "left in ..." and "right in ..." name a direction
    "facing faces face faced leaning leans lean leant tilting tilted tilts bending bends bent turning turned turns turn "
    "pointing points pointed angled curving curves veering veers swerving swerves"
)
POSED = _set("seated standing kneeling pictured shown arrow")  # "seated right."
AFTER_BEARING = _set("in on while with against near next under above beside")
CROSSINGS = _set("intersection corner junction crossing crossroads light lights roundabout fork")
PARTS = _set(
    "side sides hand hands handed arm arms leg legs foot feet eye eyes ear ears shoulder shoulders corner corners edge edges "
    "half third quarter wing wings wheel wheels lane border part portion section wall bank panel hemisphere knee cheek thigh "
    "wrist ankle paw paws hoof horn elbow hip breast chest page profile margin door window end foreground background quadrant "
    "column sleeve pocket shoe boot glove sock thumb finger claw fin headlight headlights taillight tower turn eyebrow "
    "nostril temple forearm bicep palm fist heel toe hindleg foreleg forepaw flank tusk antler mirror image frame handside "
    "area facing view views ventricle atrium lung kidney lobe hook jab uppercut tyre tyres tire tires earring earrings engine "
    "pedal lens rein fender lapel armrest hindquarter pupil iris calf shin jaw "
    "aisle branch"
)
BETWEEN = _set(
    "front back rear hind upper lower top bottom outer inner hand side index middle ring little big facing forward breast "
    "shirt trouser jacket coat trousers pinky fore"
)
CLOTHS = _set("fabric cloth leather material paper")  # their right side
CLAIMS = _set("by divine natural equal no legal sole")  # the divine right of kings
STARTING = _set("get gets got getting off start starts started starting")  # on the right foot
WAKING = _set("wake woke waking history law")  # the right side of the bed to wake up on
LEANERS = _set(
    "newspaper newspapers magazine voter voters press media party parties politician politicians government press"
)
SPOKEN = _set("here so now then let let's this that where what who i you we it")
# Left half full.
HALVES = _set("full empty eaten open finished drunk buried hidden way as asleep done painted built closed")
THINGS = _set(
    "jar mug table chair lamp tree building bottle glass cup vase bowl plate figure dog cat bird horse car truck bus boat ship "
    "house sofa couch bed shelf cabinet drawer picture photo photograph tile burner pane pillar column speaker monitor screen "
    "candle flower cube sphere box pillow curtain nightstand lantern oar armchair stool lighthouse bridge plant three one "
    "image statue lion thumbnail"
)
ARRIVING = _set(
    "got get gets getting delivered came come comes arrived arrives went brought sent hop hops board boards"
)
CORRECT = _set("track path note course road day people person man woman foot one level scale direction")
FOLLOW = _set(
    "of and or is are was were in with while on at as by has have holds shows stands sits stand sit lies appears can there "
    "there's where who which that beside behind near under above below from has wears walks looks faces but also then to we you"
)
PAUSE = _set(". , ; : ! ? ) ] — – … |") | {""}
SCENES = _set(
    "picture image photo photograph frame painting scene page screen canvas room table building house street road stage door "
    "window bed shot composition drawing"
)
HYPHENED = _set(  # left-handed, left-to-right
    "most handed hander handers handedness ward wards sided eyed footed footer legged armed aligned justified left right to "
    "pointing facing leaning hand"
)

# Other senses of "left".
LEFT_HELPERS = _set(
    "has have had having was were is are be been being gets got get getting just recently already never who they he she it "
    "we i people someone everyone everybody nobody accidentally carelessly what's that's remains"
)
LEFT_ON = _set(
    "on in at by under behind out over alone open unattended outside inside empty abandoned unfinished untouched unused "
    "uneaten unpainted hanging beside near against the a an his her their its some after for ajar bare blank half dangling "
    "where"
)
LEFT_ON_HELPED = LEFT_ON | _set(
    "with without standing sitting lying leaning to it them him me us my no only from "
    "broken wide closed shut dirty wet burning clean intact unlocked undone"
)
LEFT_DOING = _set("leaning standing lying hanging sitting burning rusting rotting drying soaking running waiting")
STANCES = _set(  # "stands left by the road", "the man most left in the row": a side as likely as not
    "stand stands standing stood sit sits sitting sat seated lie lies lying kneel kneels kneeling crouching hang hangs hanging "
    "visible seen shown pictured depicted placed positioned located situated parked appears appearing rests resting perched most "
    "second third"
)
PERSONS = _set(
    "man woman boy girl child kid person lady guy player men women boys girls children kids people players figure bride groom"
)
GROUNDS = _set("image picture photo photograph frame scene background foreground row distance")
BEING = _set("is are was were")
RESTS = _set(  # of which little "is left"
    "only just half hardly barely none slice slices piece pieces crumb crumbs bite bites bone bones bit bits rest "
    "remains"
)
TRACES = _set("print prints track tracks mark marks trail trails streak streaks")  # "a dog left paw prints"
HAVING = _set("has have had having")  # "a man has left hand on his hip"
LIMBS = _set("hand hands handed arm arms leg legs foot feet footed paw eye ear knee shoulder elbow wing side")
LEAVERS = _set(
    "has have had having who someone somebody everyone nobody he she they we i just recently already accidentally carelessly"
)
REMAINDERS = _set(
    "slice slices piece pieces bite bites crumb crumbs cookie cookies doughnut doughnuts leaf leaves drop drops"
)
GOERS = _set("everyone everybody nobody he she they who")  # "after everyone left"
FEW = _set("only no few some little nothing not")
LEFT_NOUNS = _set("luggage overs")

# Other senses of "right".
RIGHT_NOUNS = _set(
    "angle angles angled triangle triangles moment time place size answer choice amount whale whales way kind thing things "
    "conditions perspective distance height temperature occasion outfit crowd "
    "stuff mind royal reverend honourable honorable mood tool tools word words reason balance fit idea mix attitude people"
)
RESTING = _set("up perched placed parked built landing landed balanced")  # "curled up right on the keyboard"
RIGHT_OF = _set("way passage return reply refusal entry")
RIGHT_TO = _set("vote bear be privacy speak remain live work strike protest know choose roam repair education freedom")
VERY = _set(
    "next beside behind above below under underneath beneath across before after away now here there through up down out "
    "off into onto over against around along outside inside between near when as past alongside among by overhead where"
)
RIGHT_PHRASES = {
    "in": (("front",), ("the", "middle"), ("the", "center"), ("the", "centre"), ("the", "heart"), ("the", "midst")),
    "on": (("top",), ("time",), ("cue",), ("the", "edge"), ("the", "spot"), ("the", "money")),
    "at": (("home",), ("the", "edge"), ("the", "camera"), ("the", "viewer"), ("the", "end"), ("the", "start"),
           ("the", "entrance"), ("the", "water"), ("the", "water's"), ("the", "foot"), ("the", "front"), ("the", "back"),
           ("you",), ("me",), ("us",)),
    "to": (("the", "edge"), ("the", "top"), ("the", "end")),
    "down": (("the", "middle"), ("the", "center"), ("the", "centre")),
    "into": (("the", "camera"), ("the", "lens"), ("camera",)),
    "toward": (("the", "camera"), ("the", "viewer"), ("you",), ("me",), ("us",)),
    "towards": (("the", "camera"), ("the", "viewer"), ("you",), ("me",), ("us",)),
    "from": (("the", "oven"), ("the", "start"), ("the", "beginning"), ("the", "box"), ("the", "tree"), ("the", "pan")),
}  # fmt: skip
JUDGED = _set("all just quite not that's feels feel feeling felt seems everything's miss mr mrs ms mister")
DOING = _set("get gets getting got do does doing did done put puts putting set make makes going")

# What forbids the flip of the whole caption.
LISTING = _set(
    "listing lists leaning leans heeling heels heeled turning turns turned tilting looking one off"
)  # to port
SHIPS = _set("side bow quarter beam tack stern light")  # of port
TURNING = _set("clockwise counterclockwise anticlockwise starboard southpaw southpaws lhs rhs")
TYPOS = _set("rigth rihgt rght rigt lefft leftt lfet rightt")
POLITICS = _set(
    "politics political politician politicians parliament senate senator senators party parties protest protesters protestors "
    "rally election elections voters candidate candidates supporters extremist extremists populist populists activists "
    "government coalition nationalist nationalists socialist socialists conservative conservatives"
)
POLITICAL = _set("far hard alt center centre new extreme radical religious christian")
FIELDS = _set("fielder fielders field winger wingers back backs midfielder")  # positions in a team
LETTERING = _set(
    "lettering inscription inscriptions inscribed calligraphy calligraphic handwriting handwritten spelled spelling spells "
    "spelt letters words word text texts caption captions captioned written titled entitled labeled labelled emblazoned "
    "numeral numerals digits map maps"
)
SAYING = _set("says say saying reads read reading")
CARRIERS = _set(
    "sign signs signboard billboard poster banner shirt tshirt plate label screen board placard chalkboard blackboard "
    "whiteboard sticker plaque tattoo graffiti mug cap badge note card truck bus van display marquee cover jersey headline"
)
READERS = _set("a an the his her their its my to in on from at by while and , . book books newspaper newspapers")
NUMBERS = _set("zero one two three four five six seven eight nine ten eleven twelve")
CLOCKS = _set("clock clocks watch wristwatch clockface")
TELLING = _set("shows showing reads reading says displays displaying o'clock past quarter midnight noon")

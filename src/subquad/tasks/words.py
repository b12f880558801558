"""Word lists: names for needles, and the vocabulary of generated prose. The two share no word."""

# ruff: noqa: SIM905

NEEDLE_ADJECTIVES = """
able abrupt acid acute agile airy alert alive amber ample angry arctic ardent ashen astute austere
avid aware azure barren beige bitter bleak blind blunt bold brash brave brief brisk brittle bronze
brown bulky bumpy calm candid careful caring casual cautious cheeky chubby civil classy clever
coarse cobalt colossal compact copper cordial cosmic courtly cozy craven crimson crooked cruel
cryptic cunning curious curt cyan damp dapper dazed deft delicate devout dewy dingy discreet
docile dormant downy drastic dreamy dry dual dusky dusty earnest eerie elated elegant elfin
eminent emerald erratic exotic fabled faint famous feisty feral fervent festive fierce fiery
flashy fleet floral fluffy foamy fond forlorn frail frank frosty frugal fussy fuzzy gaudy genial
gentle giddy gifted gilded glad gleeful gloomy golden grand grassy greedy grim grouchy grubby
grumpy gullible hairy hardy harsh haughty hazy hectic hefty hidden hoarse homely husky icy immense
indigo innate intense ivory jaded jaunty jovial joyful juicy jumbo kind kingly knotty lanky lazy
leafy lime lithe livid lonely loud loyal lucid lunar lush major maroon mellow mighty minty modest
moody muddy mural musical mute mystic narrow nautical neon nervous nimble noble nutty obscure odd
opaque orange oval pale peach pearly pesky placid plaid plucky plump poetic polite prickly prim
proud prudent purple quaint quick quirky radiant rapid rash regal rigid robust roomy rosy royal
rubber rusty rustic sandy sassy savage scarlet secret shabby shaggy sharp sheer shrewd shy silken
silver sincere sleek sleepy slick slim smoky smooth snappy snowy snug soft solar somber sonic
sparse speedy spiky spry stealthy stern stiff stout strict sturdy suave sullen sunny supple swift
tacit tangy tardy taut teal tense tepid thirsty thrifty tidy tiny tranquil tricky trim trusty
turbid upbeat vague valiant vast velvet vibrant violet vivid wacky wavy weird wild windy wiry
wistful witty wry young zealous
""".split()

NEEDLE_NOUNS = """
abacus acorn admiral airship algae alpaca amulet android antelope anvil apron aquarium armor
artichoke asteroid attic axle badger bagpipe balloon bamboo bandana banjo barbecue barrel basil
bassoon bayou bazaar beaver bicycle biscuit blanket blender blizzard bonfire bonnet bottle bouquet
bracelet brooch broccoli bucket buffalo bugle bumblebee burrito buzzard cactus camel canary cannon
canoe caramel cardigan caribou carousel catapult caterpillar cavern chameleon chandelier cheetah
cherub chimney chisel chorus cinnamon clarinet clover cobweb coconut compass conifer coriander
cougar crayon cricket croissant crystal cucumber curtain cyclone daffodil dahlia daisy diadem
dingo dinosaur domino doorbell dragon drumstick dumpling eagle easel eclipse elephant elk emblem
envelope falcon feather ferret ferry fig flamingo flannel flounder foxglove freckle frigate fudge
galleon garlic garnet gazelle geyser ghost giraffe glider goblet gondola goose gorilla grape
grapefruit gravy guitar hammock hatchet hawk hedgehog helmet heron honeycomb hourglass hummingbird
hyacinth ibex iceberg iguana insect jackal jasmine javelin jigsaw kangaroo kayak kettle kitten
kiwi labyrinth lacquer lagoon lark lasagna lemon leopard lettuce lilac limerick llama locket
locust lynx magnet magnolia mallard mandolin mango maple marigold marshmallow meadowlark medallion
mermaid minnow mitten mongoose mosaic mosquito mulberry mushroom mustard nebula necklace newt
noodle nutmeg obelisk ocelot omelet opal opossum oregano osprey ostrich oyster pancake panda
panther papaya parachute parrot parsley peacock pebble pelican penguin pepper periwinkle pheasant
piano pigeon pirate pistachio platypus polecat pomegranate poppy porcupine prism pumpkin puppet
python quartz quill rabbit radish raft raspberry raven rhino ribbon robin rooster ruby saddle
salamander sandal sapphire satchel saucer scarecrow scooter scorpion seahorse shamrock shark
shrimp skunk snail sombrero sparrow sphinx squid squirrel stingray strawberry submarine sunflower
swan tadpole tangerine tapestry teapot termite terrier thistle tiger toad tomato topaz tortoise
trampoline trapeze trombone tulip tuna turnip turquoise tuxedo umbrella unicorn viola viper
volcano waffle walrus warthog watermelon weasel whistle wizard wolf woodpecker yogurt zebra zinnia
""".split()

NOUNS = """
road river town village house garden field hill valley harbor market school teacher student doctor
farmer sailor baker builder painter writer reader letter story book page word line lesson question
answer reason method habit plan idea thought feeling memory promise effort result change choice
chance danger journey visit meeting supper breakfast dinner table chair window door wall floor
roof kitchen room stair corner street bridge station train ship boat wagon engine wheel hammer
shovel ladder rope plate cup spoon lamp fire stone brick tree branch root seed flower fruit crop
harvest winter summer spring autumn morning evening night noon hour minute week month year season
rain wind storm cloud sky star moon sun shadow light color sound song music dance game winner
loser player team captain friend neighbor stranger guest host family mother father brother sister
cousin uncle aunt daughter parent baby boy girl crowd council mayor judge lawyer clerk banker
merchant trader customer price coin debt gift prize reward wage tax law rule order duty right
crime court prison guard soldier army battle peace border nation king queen prince palace tower
gate church temple grave nurse patient fever wound cure body head face eye ear nose mouth hand arm
finger shoulder knee heart voice dream cat dog horse cow goat hen duck bird bee ant worm forest
island beach shore lake stream pond well mountain cliff cave desert plain path map guide traveler
coat shirt shoe hat glove button thread cloth pencil ruler clock bell mirror box bag cheese egg
soup tea coffee wine beer iron tool machine factory mill mine office shop library museum theater
hospital college class course subject theory example problem solution language animal plant planet
world country city county region district people person worker master servant leader member
partner rival enemy witness signature record report notice message newspaper camera picture
portrait statue poem novel chapter title author editor critic audience actor stage scene
""".split()

# Regular ones only: their forms are made by rule.
VERBS = """
walk talk climb jump turn open close start finish follow carry gather deliver collect repair
polish paint plant water harvest cook bake roast boil taste serve clean wash mend measure weigh
count compare check test study learn explain describe discuss answer ask invite greet welcome
visit thank help support protect guard warn watch notice discover explore search inspect examine
record report copy print publish review correct improve change replace remove restore cover pack
load lift push pull toss pass handle use need want enjoy admire praise respect trust doubt
question accept refuse reject argue decide prepare arrange organize order request demand offer
promise provide supply receive return borrow rent own share divide join connect attach separate
remain stay wait rest camp travel sail row float march hurry rush wander stroll arrive depart
reach enter approach cross circle surround fill empty pour mix melt cool heat warm soak burn glow
reflect shout whisper sigh laugh smile frown wave point knock play perform practice train coach
guide direct manage rule govern elect appoint hire charge earn save waste trade market export
import design shape carve form mold sketch draft type mail post address sign seal fold staple file
sort list rank name mark stamp date
""".split()

ADJECTIVES = """
old new small large long short tall wide heavy plain simple common usual regular normal central
local public private formal early late recent former present future daily weekly yearly final main
chief single double whole entire complete empty full open closed free busy ready certain likely
possible useful useless valuable cheap expensive rich poor strong weak healthy sick tired fresh
stale raw cooked warm cool hot cold wet clean dirty clear dark pleasant friendly polished
practical reasonable sensible serious strange familiar similar different equal separate distant
near remote northern southern eastern western inner outer upper lower middle front rear left
straight curved round square flat level even uneven fair just correct wrong true false real
natural wooden stone brick written spoken printed painted broken repaired lost missing found given
known unknown famed popular beloved respected proper suitable fit steady slow constant frequent
rare occasional humble gracious thoughtful skillful cheerful hopeful grateful restless careworn
tireless honored aged
""".split()

ADVERBS = """
always often sometimes rarely seldom never soon later early again together apart away nearby
inside outside upstairs downstairs everywhere somewhere already still almost nearly quite rather
fairly very truly simply slowly suddenly gladly openly properly firmly lately usually mostly
partly wholly fully directly exactly roughly evenly safely easily daily yesterday today tomorrow
tonight meanwhile instead perhaps indeed besides
""".split()

"""Word lists of the document generator: names, places, animals and other values.

Only data. Everything is invented for this project or common vocabulary; some names and places are
built from syllables (`coined`), so that a model trained on the documents has to copy what it reads
and cannot rely on a closed list.
"""

from __future__ import annotations

from random import Random

FIRST_F = """Mara Ingrid Anna Beatriz Clara Daria Elena Freya Greta Hanna Irma Jana Katya Lena Maren
Nadia Olga Petra Rosa Sofia Tilda Ursula Vera Wanda Yara Zoe Alma Britta Carmen Dora Edith Fatima
Gloria Helga Isabel Judith Karin Leila Mila Nora Odette Paula Rita Sara Thea Una Viola Wilma Yvonne
Zelda Aisha Bianca Celia Diana Emma Flora Ida Joan Lotte Mabel Nina Oriana Priya Ruth Selma Tessa
Agnes Amina Astrid Camille Dagny Eliza Farah Hedda Imani Jolanda Keiko Linnea Mei Noor Paloma Renata
Saskia Tamar Valeria Willa Xenia Yuki Zofia Adele Berit Corinne""".split()

FIRST_M = """Otto Aron Bruno Carl David Emil Felix Gustav Henrik Ivan Jonas Karl Leo Marco Nils Oskar
Pavel Rolf Stefan Tomas Ulrich Viktor Walter Yusuf Zoltan Adam Boris Cedric Dmitri Edgar Fabio Georg
Hugo Igor Jakob Kurt Lars Martin Noah Oliver Pedro Rafael Simon Theo Uwe Vincent Wilhelm Yannick
Anders Bjorn Cyrus Darius Erik Farid Gabriel Hassan Ismael Joel Kenji Luca Mateo Nikolai Omar Piet
Quentin Ravi Samuel Tariq Umar Vasco Wim Xavier Yoav Zeno Alvaro Bastian Conrad Dario Elias Finn
Gideon Harald Ilya Jasper Klaus Linus Milo Nestor Orlando Pascal Ruben Soren Tobias Valentin""".split()

LAST = """Lindqvist Brandt Okafor Hale Moreau Petrov Castillo Novak Weber Tanaka Silva Hoffmann Rossi
Larsen Dubois Kowalski Varga Jensen Ferrari Schmidt Nakamura Almeida Fischer Conti Nilsson Laurent
Zielinski Szabo Andersen Marino Keller Sato Pereira Wagner Greco Berg Fontaine Wojcik Nemeth Dahl
Bianchi Krause Mori Costa Becker Ricci Holm Girard Mazur Farkas Lund Romano Vogel Ito Ramos Schulz
Galli Strand Bonnet Pavlov Molnar Haug Esposito Winter Kato Duarte Richter Serra Vik Rousseau Sokolov
Balogh Moen Ferri Kaiser Abe Teixeira Lange Rinaldi Falk Chevalier Orlov Takacs Nygaard Leone Busch
Ueda Pinto Seidel Testa Solberg Mercier Popov Lakatos Eide Caruso Horn Endo Barros Arnold Villa Aas
Renaud Morozov Juhasz Hagen Ferraro Pohl Fujita Lopes Jung Fabbri Myhre Picard Volkov Simon Bakke
Mancini Graf Goto Matos Haas Barone Lien Marchand Lebedev Fekete Thorsen Monti Voigt Hara Neves Sommer
Palmieri Sunde Aubert Kozlov Papp Halvorsen Vitale Zimmer Okada Freitas Engel Sala Tveit Lemaire
Egorov Sipos Amundsen Basile Ott Hasegawa Cardoso Brauer Guerra Rahman Osei Mensah Diallo Achieng
Kamau Banerjee Iyer Kapoor Nair Haddad Mansour Khoury Demir Yilmaz Aydin Castellan Ashdown Birch
Calloway Drummond Ellery Fairburn Garrick Hollis Kestrel Lockwood Marlowe Pemberton Quill Radcliffe
Stroud Thackeray Underhill Vance Whitlock Yardley Ainsley Bexley Corwin Dunmore""".split()

PLACES = """Kirkwall Brevik Halden Orsova Lerwick Tromso Varde Zadar Piran Sligo Tralee Nairn Oban
Whitby Ribe Skagen Visby Mora Kalmar Ystad Porvoo Kotka Narva Parnu Cesis Kuldiga Nida Trakai Sopot
Gdynia Torun Olomouc Trebic Levoca Eger Sopron Sibiu Balchik Ohrid Kotor Trogir Ptuj Gorizia Asolo
Lucca Urbino Matera Noto Sitges Cuenca Ronda Tavira Evora Guarda Dinan Honfleur Sarlat Colmar Dinant
Bouillon Delft Hoorn Zutphen Bremen Celle Goslar Bamberg Fussen Meersburg Chur Thun Morges Feldkirch
Hallstatt Steyr Krems Bergen Alta Bodo Molde Voss Larvik Moss Horsens Nyborg Svaneke Husavik Akureyri
Selfoss Stromness Ullapool Mallaig Portree Dunkeld Kelso Alnwick Settle Buxton Ludlow Tenby Conwy
Harlech Fowey Looe Rye Deal Aldeburgh Cromer Ely Stamford Louth Bantry Kinsale Dingle Westport
Ardmore Lahinch Cobh Killarney Athlone Bunratty Seaford Ashgrove Millbrook Fernhill Larkspur Oakhaven
Stonebridge Windermoor Greyharbor Foxhollow Elmsworth Redcliff Silverford Thornbury Maplewick
Ravenglass Briarfield Cloverdale Driftwood Eastmere Fallowfield Glenmoor Hartwell Ivybridge Juniper
Kingsferry Lowmarsh Merrow Northolm Otterburn Pinecrest Quarrydale Rosslyn Saltmarsh Tidewell Upham
Vinehall Westerby Yarrow Amberley""".split()

ANIMALS = """lynx badger otter falcon heron gecko ferret parrot tortoise hedgehog rabbit hamster
canary iguana llama alpaca donkey goat pony goose peacock raven magpie python chinchilla marmot
salamander axolotl lobster crab octopus seahorse turtle newt toad squirrel raccoon meerkat mongoose
wallaby kestrel barn-owl cockatoo macaw finch pigeon pheasant quail duck swan turkey rooster hen
sheep calf piglet mule camel reindeer elk moose fox wolf-dog greyhound poodle beagle terrier collie
spaniel dachshund husky mastiff pug corgi whippet setter pointer retriever tabby manx ragdoll
sphynx bobtail goldfish koi guppy stingray eel catfish pike carp trout perch snail tarantula scorpion
mantis beetle cricket moth butterfly honeybee silkworm mouse rat gerbil vole shrew mole bat dormouse
capybara porcupine armadillo sloth anteater tapir okapi zebra yak bison buffalo ox gazelle ibex
chamois weasel stoat mink sable marten skunk civet genet ocelot serval caracal puma jackal dingo
hyena coati kinkajou lemur loris tamarin macaque gibbon emu rhea ostrich cassowary kiwi stork crane
ibis flamingo pelican cormorant gull puffin penguin albatross""".split()

INSTRUMENTS = """cello violin viola oboe bassoon clarinet flute piccolo trumpet trombone tuba cornet
harp lute mandolin banjo ukulele guitar sitar zither dulcimer accordion concertina harmonica bagpipes
piano organ harpsichord celesta xylophone marimba vibraphone timpani bongos tabla djembe cajon
recorder ocarina saxophone euphonium flugelhorn theremin fiddle bouzouki balalaika koto shamisen erhu
kalimba didgeridoo triangle tambourine glockenspiel double-bass hurdy-gurdy lyre oud sarod""".split()

DRINKS = """espresso cocoa lemonade cider kefir buttermilk horchata chai matcha sencha rooibos
oolong mate ginger-ale root-beer tonic seltzer kombucha kvass lassi sherbet mocha cortado ristretto
barley-tea mint-tea apple-juice pear-juice beet-juice carrot-juice plum-juice grape-juice tomato-juice
elderflower birch-sap almond-milk oat-milk malted-milk nettle-tea fennel-tea rosehip-tea hibiscus-tea
jasmine-tea camomile-tea sage-tea liquorice-tea quince-juice cherry-juice currant-juice melon-juice
""".split()

ROLES = """archivist electrician geologist surveyor translator welder botanist accountant dispatcher
cartographer carpenter nurse plumber librarian mechanic baker gardener chemist diver optician glazier
tailor potter bookbinder locksmith harbour-master meteorologist machinist draughtsman beekeeper
forester caretaker porter purser steward rigger sailmaker stonemason roofer painter engraver typesetter
proofreader editor paralegal auditor actuary analyst statistician physicist astronomer seismologist
hydrologist ecologist zoologist veterinarian pharmacist dietitian physiotherapist paramedic radiologist
dentist midwife counsellor tutor lecturer registrar curator conservator florist upholsterer cooper
saddler farrier miller brewer cheesemaker butcher fishmonger""".split()

VEHICLES = """bicycle tandem scooter moped motorcycle kayak canoe rowboat dinghy sailboat tractor van
pickup minibus tram-pass hatchback estate-car convertible jeep camper snowmobile sledge skis rollerblades
skateboard unicycle tricycle cargo-bike handcart hovercraft catamaran speedboat raft gondola trawler
houseboat steam-launch motor-sledge quad-bike dune-buggy""".split()

TEAMS = """Harbor Lantern Meridian Compass Anchor Beacon Cascade Delta Ember Fathom Granite Horizon
Indigo Juniper Kelvin Lagoon Mosaic Nimbus Orchard Prairie Quartz Ridge Summit Tundra Umber Vertex
Willow Zenith Alder Basalt Cinder Dune Estuary Fjord Glacier Heath Inlet Jetty Knoll Ledge""".split()

SERVICES = """Osprey Sextant Bluebird Cobalt Dovetail Everglade Foxglove Gantry Hatchway Ironwood
Jackdaw Keystone Lodestar Mainsail Nightjar Oxbow Plumbline Quicksand Rookery Sandpiper Tollgate
Underpass Viaduct Waterwheel Yardarm Almanac Bulwark Capstan Drawbridge Echosound Flywheel Gearbox
Handrail Inkwell Jigsaw Kiln Lattice Millstone Nutshell Outpost Pulley Quiver Rudder Spindle Trellis
Turnstile Vestibule Windlass Backbone Crossbar Dashboard Eyelet Footbridge Gridiron Hinge""".split()

SITES = """Skarv Holmen Torvik Nesset Fjellet Varden Grimsey Lyngen Sandoy Myken Utvaer Slettnes
Kvitoy Ryvarden Stadt Runde Hasvag Nordfjord Oksoy Tungenes Ferder Homborg Svenner Bjornoy Hopen
Alsten Brattholm Crowness Dunnet Eldey Flatey Gasdal Hornvik Isfjord Jarlso Krossnes Litlevik
Mannes Nordkyn Ostervag Persfjord Raudoy Selvag Tarva Ulvoy Vestvik""".split()

MONTHS = """January February March April May June July August September October November
December""".split()

WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

ROOMS = """Cedar Maple Walnut Birchwood Rosewood Poplar Linden Aspen Hazel Spruce Hickory Cypress
Laurel Myrtle Acacia Sycamore Chestnut Magnolia Sequoia Tamarack Hemlock Larch Rowan Elder Hawthorn
Ebony Teak Olive Cherry Plum""".split()

ORGANISATIONS = """Northwind Aldergate Bellwether Corriedale Dunelm Eastlight Fennimore Glasswater
Hollybrook Ironbark Kestleton Longacre Moorland Nethercote Overton Priory Quayside Rookwood Stonefield
Tidewater Vantage Wexcombe""".split()

_ONSETS = "b br c d dr f g gr h j k kl l m n p r s st t tr v w z sh th".split()
_VOWELS = "a e i o u ae ei ia o a e".split()
_CODAS = "l n r s t nd rn sk lm v x m ck rt ll n r".split()


def coined(rng: Random, syllables: int) -> str:
    """A pronounceable invented word with a capital letter, `syllables` >= 1."""
    word = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables))
    return (word + rng.choice(_CODAS)).capitalize()

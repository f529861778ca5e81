"""Make the bundled demo requests: few-shot prompts in the XSum form, over news of an invented country.

    python scripts/make_demo_data.py --output-path data/summarization/demo.jsonl

Names are made from word parts and sentences from the patterns below; nothing is copied from elsewhere. Articles are
built like news. The lead states the facts, the next paragraphs repeat them among facts about others, and a long
background with other people, places and figures follows. The reference summary states the lead's facts in other words,
which depend on the event. `scripts/train_demo.py` also draws its documents from here, with names that no test request
uses.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:  # run as a file of a clone
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from h2optimizer.utils import cli

if __name__ == "__main__":
    cli.begin()

from h2optimizer.utils.cli import InputError, OneLineParser, count, output_file, seed
from h2optimizer.utils.results import replace_file

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "###\nArticle: {article}\n\nSummarize the above article in 1 sentence.\n"
SHOT = PROMPT + "{summary}\n\n"
REQUEST = {"max_tokens": 64, "temperature": 0.3, "top_p": 1, "n": 1, "stop": ["###"], "logprobs": 1}
SHOT_WORDS, ARTICLE_WORDS = (85, 130), (320, 380)
BACKGROUND_WORDS = 165  # least words of background at the end of an article

# Names: onset + rime + an ending that tells what is named.
ONSETS = "B Br C Cl Cr D Dr F Fl G Gl Gr H J K L M N P Pr Qu R S Sk St T Th Tr V W Y Z"
RIMES = "al ar an el en er il in or os ul ur"
ENDINGS = {
    "she": "a ia ina etta elle isse wen idy",
    "he": "o us ek ard iam oth aric ild",
    "surname": "bek brook dale den dorn fall garth gate gill grave hart helm hurst kell ket lace lock lund mere mond "
    "nett nock pell quist rick row sley son strand ton vane ven wick wood yard zell",
    "town": "burgh mouth ford stead holm haven ness port bridge minster thwaite combe wold worth marsh cross leigh "
    "fleet staithe bourne cliffe water heath moor pool sands",
    "head": "anta ovia exa ium ara ique oro undi etto ivar ondo ulea amis eron",  # for organisations and sites
}
TEST_SHARE = 0.15

# Patterns. [a|b] is a choice. Lower-case slots are the story's facts: {who} and short {Ms}, {she}, {her}, {him};
# {role}; {org} and short {body}; {town}; {site} and short {spot}; {num} with {unit}; the {event}. Capital slots are
# somebody else's, new in each sentence: {P} and short {Ps}, {R} role, {O} organisation, {T} town, {S} site, {N} two
# digits, {K} three, {M} money. A line's first character says what it holds: * a kind of news with its organisations,
# roles, sites, sort of number and unit; > the lead of an event; = the event and its summary; + a sentence that takes
# facts up again; - background.
NEWS = """
* council; Town Council|District Council|Borough Council; councillor|treasurer|planning officer|campaigner|architect;
  Library|Baths|Market Hall|Park|Museum; money; crowns
> [After a long debate|By a narrow majority], {org} has voted to [save|restore] {site} in {town}. The decision sets
  aside {num} crowns and follows a petition by {role} {who}.
= restoration: {site} in {town} will be restored for {num} crowns after {who} won over {org}.
> The doors of {site} in {town} will [shut|close] for good [this spring|in the autumn]. {org} [admitted|said] that it
  had not found the {num} crowns for repairs that {role} {who} had [called for|demanded].
= closure: {org} is to close {site} in {town} because repairs sought by {who} would cost {num} crowns.
> {role} {who} has [lost a fight|failed in a bid] to keep {site} in public hands. {org} [agreed|resolved] on {day} to
  let the [building|property] in {town} go to a buyer for {num} crowns.
= sale: {org} is selling {site} in {town} for {num} crowns despite protests by {who}.
+ {who} [told the meeting|reminded members] that {site} had served {town} [for generations|since before the war].
+ Papers [published|released] by {org} show how the {num} crowns for {site} were worked out.
+ The chair of {org} [thanked|praised] {Ms} for {her} [patience|work] on {site}.
- Councils across the region must save {M} crowns by [next spring|the end of the year].
- A vote in {T} last year on {S} ended in a [tie|walkout] when {P} left the chamber.
- The ruling group holds {N} of the {N} seats, and a by-election is due [soon|in the summer].

* court; Savings Bank|Housing Trust|Sailing Club|Charity; bookkeeper|cashier|manager|solicitor|clerk;
  Court|Assizes|Crown Court; money; crowns
> A [judge|court] has sent {role} {who} to prison. {site} heard that {she} had [moved|taken] {num} crowns from {org}
  in {town} [to pay debts|to buy a boat|over several years].
= sentence: {who} has been jailed at {site} for stealing {num} crowns from {org} in {town}.
> {role} {who} walked [free|away] from {site} on {day} after a jury [threw out|rejected] the charges. {she} had been
  accused of taking {num} crowns from {org} in {town}.
= acquittal: A jury at {site} has cleared {who} of taking {num} crowns from {org} in {town}.
> {org} will get back {num} crowns from its former {role} {who}, {site} has [ruled|ordered]. The money [vanished|went
  missing] from its office in {town}.
= repayment: {who} must repay {num} crowns to {org} in {town}, {site} has ruled.
+ The prosecution told {site} that {Ms} had kept [two sets of books|a second account].
+ Nobody at {org} had [noticed|missed] the {num} crowns until an audit in {month}.
+ {who} was [arrested|first questioned] at {her} home in {town} in {month}.
- Courts in the region deal with {K} cases of fraud [a year|each year], most of them small.
- In a similar case in {T}, {P} was given {N} months for taking {M} crowns from {O}.
- Sentences for fraud were raised {N} years ago after a report by {R} {P}.

* crash; Fire Service|Ambulance Service|Police|Highways; lorry driver|farmer|cyclist|teacher|plumber;
  Lane|Hill|Roundabout|Viaduct; few; people
> A [coach|bus] left the road on {site} near {town} [early|late] on {day}, and {num} people were taken to hospital.
  {org} named the driver of the other car as {role} {who}.
= collision: {num} people were hurt when a coach and a car driven by {who} collided on {site} near {town}, {org} says.
> {role} {who} has died in a crash on {site}, {org} has [confirmed|said]. The [fog|ice] that morning near {town} left
  {num} people stuck in their cars.
= death: {who} has been killed in a crash that trapped {num} people on {site} near {town}, according to {org}.
+ {org} [closed|cleared] {site} for [most of the day|several hours] and asked drivers to keep away from {town}.
+ {Ms} had been on {her} way [home|to work] from {town} along {site}.
+ All of the {num} people [were seen|were checked] by crews of {org}.
- There were {K} accidents on roads in the region last year, {N} of them serious.
- A safety camera at {S} near {T} was [removed|switched off] in {month}.
- Road safety groups want the limit cut, an idea that {R} {P} has turned down before.

* sport; Rovers|Athletic|Wanderers|United; striker|captain|goalkeeper|coach|midfielder; Cup|Shield|Trophy|League; few;
  goals
> {role} {who} has put pen to paper with {org}, and [fans|supporters] in {town} are [delighted|thrilled]. {she} comes
  with {num} goals in the {site} behind {her} name.
= signing: {org} have signed {who}, who scored {num} goals in the {site}, from a rival in {town}.
> {org} have [parted|broken] with {role} {who} after a [poor|dismal] run in the {site}. {num} goals let in [since the
  winter|this season] were too many for the board in {town}.
= sacking: {who} has been sacked by {org} in {town} after {num} goals were conceded in the {site}.
> The {site} is [back|coming home] in {town} for the first time in years. {role} {who} lifted it after {org} ended a
  [campaign|season] of {num} goals with a win.
= triumph: {who} has led {org} to the {site} with {num} goals in a season to remember for {town}.
+ {Ms} [first played|grew up playing] in the streets of {town} and always dreamt of the {site}.
+ The {num} goals are [a record|unheard of] at {org}.
+ {who} [spoke|talked] to the players of {org} [in the dressing room|before training].
- The league has {N} clubs, and {N} of them lost money last year.
- A cup tie in {T} was called off in {month} because of [snow|a power cut].
- {P} of {O} is out with a [knee|back] injury until {month}.

* science; Institute|University|Observatory|Laboratory; biologist|chemist|astronomer|geologist|physicist;
  Cave|Glacier|Crater|Reef; many; fossils
> {num} fossils found [deep inside|at the foot of] {site} are [new|unknown] to science. {role} {who} and a team from
  {org} [came upon|spotted] them not far from {town}.
= discovery: Scientists from {org} led by {who} have discovered {num} fossils in {site} near {town}.
> {role} {who} has been [accused|suspected] of making up results about {site}. {org} is looking into {num} fossils
  that were shown in {town} [last month|in the spring].
= inquiry: {org} is investigating whether {who} faked {num} fossils from {site} near {town}.
+ The {num} fossils were [weighed|measured] in a hut at {site} before they left for {org}.
+ {who} first [visited|heard of] {site} as a [student|child] in {town}.
+ Colleagues of {Ms} at {org} [call|describe] {him} as [careful|stubborn].
- A [paper|study] from {T} in {month} put the age of such layers at {N} million years.
- Funds for field work have fallen to {M} crowns, according to {R} {P}.
- Rock of this kind is [rare|common] in the south, where {O} has worked for {N} years.

* business; Foods|Motors|Textiles|Brewery|Shipyard; chief executive|director|founder|chairman|owner;
  Works|Mill|Plant|Depot; many; jobs
> [Workers|Staff] at {site} in {town} have been told that {num} jobs will go. {org} [blamed|pointed to] falling
  orders, {role} {who} [wrote|said] in a letter.
= cuts: {org} is cutting {num} jobs at {site} in {town}, {who} has announced.
> {org} is to [build on|expand] its success by taking on staff at {site}. {role} {who} [expects|promised] {num} jobs
  for {town} [by the summer|within a year].
= expansion: {num} jobs are to be created in {town} as {who} expands {site} for {org}.
> {role} {who} has [stepped in|come forward] to rescue {org}, which [collapsed|ran out of money] in {month}. The deal
  for {site} [secures|protects] {num} jobs in {town}.
= takeover: A takeover of {org} by {who} has saved {num} jobs at {site} in {town}.
+ {Ms} joined {org} [as an apprentice|from a rival] and once ran {site}.
+ Unions in {town} [said|warned] that each of the {num} jobs [fed|supported] a family.
+ {site} has [made|turned out] goods for {org} since it opened in {town}.
- Sales in the trade fell by {N} per cent in the last quarter, figures from {O} show.
- A rival plant in {T} was [shut|sold] for {M} crowns by {P}.
- Wages in the region are {N} per cent below those in the capital.

* weather; Weather Office|Rivers Authority|Coastguard|Flood Board; forecaster|harbour master|hotel
  owner|warden|engineer; Valley|Quay|Embankment|Point; many; homes
> [Heavy rain|A night of rain] has sent water over {site} and into {num} homes in {town}. {org} [had warned|warned] of
  it a day before, {role} {who} said.
= flood: {num} homes in {town} have been flooded after water broke over {site}, {who} of {org} says.
> A [gale|storm] has torn roofs off {num} homes in {town}. Gusts at {site} were the [strongest|worst] that {org} has
  [measured|recorded], according to {role} {who}.
= storm: A record storm at {site} has damaged {num} homes in {town}, {who} has told {org}.
+ {who} watched the water rise at {site} [through the night|from a window].
+ Families from the {num} homes [slept|were given tea] in a school hall in {town}.
+ {org} will [inspect|visit] {site} with {Ms} when the wind drops.
- The winter of {N} years ago was worse, and {S} was under water for {N} days.
- Insurers put the cost of such storms at {M} crowns [a year|for the region].
- Rain fell in {T} for {N} hours, and {R} {P} had to be taken off a roof.

* arts; Theatre|Opera|Gallery|Orchestra; painter|composer|actor|director|sculptor; Festival|Prize|Biennale|Season;
  few; works
> {role} {who} has [won over|charmed] the judges of the {site} with {num} works. The [show|programme] was first seen
  at {org} in {town}.
= award: {who} has won the {site} for {num} works shown by {org} in {town}.
> [Thieves|Burglars] have broken into {org} in {town} and [carried off|made off with] {num} works by {role} {who}.
  They were to be [shown|the highlight] at the {site}.
= theft: {num} works by {who} for the {site} have been stolen from {org} in {town}.
> {role} {who} has pulled out of the {site} in a row with {org}. {num} works will [not be seen|stay in storage], and
  [posters|banners] in {town} are coming down.
= quarrel: The {site} in {town} will go ahead without {num} works by {who} after a quarrel with {org}.
+ {Ms} made the {num} works in [a shed|an old chapel] near {town}.
+ Critics [first met|got to know] {who} at {org}, long before the {site}.
+ Tickets for the {site} in {town} are [sold out|on sale at {org}].
- A sale of prints in {T} brought {M} crowns for {P} in {month}.
- Public money for the arts has [risen|shrunk] by {N} per cent in {N} years.
- {O} lost {N} members of its company last year, among them {R} {P}.

* health; Hospital|Infirmary|Health Board|Clinic; surgeon|nurse|midwife|inspector|patient; Ward|Unit|Wing|Hospice;
  few; beds
> {site} has been [found|judged] unsafe, and its {num} beds stand empty. {org} in {town} [acted|moved] after a
  [warning|report] from {role} {who}.
= shutdown: {org} in {town} has shut {num} beds at {site} after {who} raised concerns about safety.
> A [gift|legacy] from {role} {who} will pay for {num} beds at {org}. The [rooms|building] in {town} will bear the
  name {site}.
= gift: {who} has left money for {num} beds at {org} in {town}, to be named {site}.
+ {who} [worked|spent months] at {site} and knows [every corner|all the staff] of it.
+ {org} [said|promised] that people from {town} would [not have to travel|be seen on time].
+ The {num} beds at {site} were [counted|checked] by {Ms} in {month}.
- Waiting lists in the region have grown by {N} per cent, and {N} posts are open.
- A ward in {T} was closed for {N} days in {month} by a virus.
- {R} {P} has asked for {M} crowns for new scanners at {O}.

* transport; Railways|Ferries|Buses|Airways; minister|commuter|train driver|regulator|engineer;
  Line|Bridge|Terminal|Tunnel; money; crowns
> The [first|opening] trip over {site} has been put off again. {org} needs a further {num} crowns for the link to
  {town}, {role} {who} [admitted|conceded].
= delay: {site} to {town} is late and needs {num} crowns more, {who} of {org} has said.
> {org} has been [fined|penalised] after delays on {site}. {role} {who} [set|fixed] the penalty at {num} crowns when
  passengers from {town} [complained|handed in a petition].
= penalty: {who} has fined {org} {num} crowns for delays to passengers from {town} on {site}.
> [Cheers|Flags] greeted the first passengers to {town} over {site} on {day}. {role} {who} opened the link, on which
  {org} spent {num} crowns.
= opening: {site} to {town} has been opened by {who} after {org} spent {num} crowns on it.
+ The {num} crowns [are|amount to] more than {org} earns [in a year|from {town}].
+ {who} [travels|has travelled] over {site} [twice a week|since {she} was a child].
+ Shopkeepers in {town} told {Ms} that {site} [matters|means everything] to them.
- Fares rose by {N} per cent in {month}, and {N} stations have lost their ticket office.
- A trial of night buses in {T} was [dropped|extended] by {P}.
- {O} runs {K} services a day in the region, most of them on time.

* election; Alliance|Party|League|Union; mayor|teacher|farmer|lawyer|shopkeeper; Ward|Vale|Central|North; many; votes
> [Cheers|Applause] rang out in {town} when {role} {who} took the seat of {site}. {org} [came in|finished] ahead by
  {num} votes, [the closest|the clearest] result in years.
= victory: {who} of {org} has won {site} in {town} by {num} votes.
> {role} {who} has lost the seat of {site} after [years|a decade]. {num} votes [were missing|were lacking], and {org}
  [called|asked] for a new count in {town}.
= defeat: {org} wants a recount in {town} after {who} was beaten by {num} votes in {site}.
> {role} {who} has [walked out on|left] {org} and will sit for {site} alone. {num} votes had [carried|brought] {him}
  to office in {town}.
= resignation: {who}, elected by {num} votes in {site}, has quit {org} in {town}.
+ {Ms} [knocked on doors|held meetings] all over {town} for {org}.
+ {site} has been [close|hard fought] before, but {num} votes [surprised|stunned] both sides.
+ Officials of {org} [hugged|surrounded] {who} [on the stairs|at the town hall] in {town}.
- Turnout was {N} per cent, and {N} papers were spoilt.
- In {T}, {P} held on to a seat that {O} had [hoped|tried] to take.
- Parties may spend {M} crowns on a campaign, a limit set {N} years ago.

* rescue; Lifeboat|Mountain Rescue|Air Rescue|Coastguard; climber|walker|fisherman|diver|sailor;
  Ridge|Bay|Rocks|Gorge; few; hours
> {role} {who} is [safe|alive] after {num} hours [on a ledge|in the cold] at {site}. A [dog|torch] led {org} to {him}
  in the dark above {town}.
= rescue: {who} has been rescued by {org} after {num} hours at {site} near {town}.
> The search for {role} {who} has been [given up|called off] after {num} hours. {org} combed {site} [by boat|on foot]
  but [returned|came back] to {town} without news.
= search: {org} has ended a search of {num} hours for {who} at {site} near {town}.
+ {who} had [set out|left] from {town} [before dawn|at noon] for {site}.
+ It was the [longest|hardest] call of the year for {org}, which stayed out for the {num} hours.
+ {Ms} [knows|had been to] {site} well, volunteers of {org} said.
- Volunteers were called out {N} times last year and have {M} crowns left for ropes.
- {P} was found dead at {S} near {T} in {month} after {N} days.
- The [path|slipway] has been closed {N} times since {R} {P} put up signs.

* school; Academy|Primary School|College|Grammar School; head teacher|governor|caretaker|parent|pupil;
  Field|Hall|Meadow|Yard; many; pupils
> Lessons for {num} pupils have [stopped|been halted] at {org} in {town} after [mould|asbestos] was found. {role}
  {who} said classes would be held at {site} [for now|until {month}].
= move: {num} pupils of {org} in {town} are being taught at {site}, {who} has said, because of a health risk.
> {num} pupils have [marched|walked] through {town} with {role} {who} to [defend|keep] {site}. {org} wants to
  [sell|build on] it.
= protest: {who} and {num} pupils have protested in {town} against plans by {org} for {site}.
+ {site} was [given|left] to {org} by a family from {town}.
+ {who} [wrote|spoke] to the parents of all {num} pupils on {day}.
+ Governors of {org} [back|support] {Ms}, who went to school in {town}.
- A school in {T} lost {N} teachers in a year, and {O} took it over.
- Results in the region rose by {N} per cent, a report by {R} {P} says.
- Roofs at {N} schools need repairs that would cost {M} crowns.

* wildlife; Wildlife Trust|Nature Society|Zoo|Bird Club; ranger|vet|farmer|volunteer|keeper;
  Wood|Marshes|Island|Reserve; few; cranes
> [For the first time|After a gap] in a century, {num} cranes have [raised|hatched] young at {site}. {role} {who} of
  {org} [saw|filmed] them from a hide near {town}.
= hatching: {num} cranes have bred at {site} near {town}, {who} of {org} has reported.
> {num} cranes have been found [dead|poisoned] at {site}, and {role} {who} is [in shock|in tears]. {org} has offered a
  reward in {town} for [names|clues].
= killing: {org} is offering a reward in {town} after {who} found {num} cranes killed at {site}.
> {role} {who} is [nursing|caring for] {num} cranes that were caught in [oil|nets] at {site}. {org} [took|flew] them
  to {town} [overnight|by van].
= treatment: {who} is treating {num} cranes in {town} after {org} saved them at {site}.
+ {Ms} [counted|checked] the {num} cranes [at dawn|from a boat] near {site}.
+ {org} [bought|fenced] {site} with gifts from people in {town}.
+ Children from {town} [drew|named] the cranes for {who} of {org}.
- Only {N} pairs of herons were [left|seen] at {S} near {T} in {month}.
- Farmers get {M} crowns a year for wet meadows, a scheme that {P} began.
- {O} has released {N} otters in {N} years, with mixed results.
"""

# For news of any kind. + takes a fact up again, & sums the story up, - is about others, ~ has short forms only.
ANY_NEWS = """
+ {who} has [lived|worked] in the area for {N} years.
+ Friends of {who} [said|told {P}] that {she} had [hardly slept|been very calm].
+ "[I did not expect this|It is hard to take in|There is much to do]," said {who}, a parent of {N}.
+ {Ms} [left the room|took no questions], but {who} later [sent a note|spoke by telephone].
+ Asked about the {event}, {role} {who} [smiled|shook {her} head|pointed to a map].
+ A [spokesman|spokeswoman] for {org} [said|added] that the matter was [closed|being looked at].
+ {org} was [founded|set up] {N} years ago and is [led|run] by {P}.
+ "We [will learn from this|have nothing to hide|owe people an answer]," {org} said [in a statement|on {day}].
+ Letters to {org} [have doubled|were read out] since the {event}.
+ {P}, who [speaks for|sits on the board of] {org}, [declined to comment|asked for patience].
+ In {town}, [little else was talked about|the {event} was met with silence] on {day}.
+ {R} {P} from {town} [said|felt] that it [had been a long time coming|was the talk of the street].
+ {town} has [about|some] {K} shops and has [seldom|never] had so many reporters.
+ People in {town} [gathered|met] on {day} [in the square|by the church] to [talk|hear more].
+ Since the {event} the name {site} [is known|has been known] far beyond the region.
+ Pictures of {site} were [shown|printed] [everywhere|in all the papers] on {day}.
+ "[Nobody|No one] here will forget {site}," said {P}, {N}.
+ It is not the first time that {site} has [made headlines|been talked about].
+ The [figure|number] of {num} {unit} was [confirmed|checked] by {P}.
+ "Of course {num} {unit} [sounds a lot|is a lot]," said {Ps}, who [did the sums|keeps the records].
+ [At first|In {month}] there was talk of [{N}|{K}], but it is {num} {unit} now, [officials|witnesses] say.
+ That it would be {num} {unit} [nobody|hardly anyone] had guessed.

& It was the {event} that brought {who} and {org}, {site} and {town} [into the papers|to the front pages] this {day}.
& What is known so far: {who}, {org}, {num} {unit}, {site} and, of course, {town}.
& [To sum up|In short], the {event} [ties|binds] {who} to {org}, {num} {unit} to {site}, and all of it to {town}.
& At {site}, {who} and {org} are on everybody's lips since the {event}, and so are the {num} {unit} in {town}.

- {R} {P} of {O} [called it|spoke of] [a turning point|a lesson|a mixed picture], and {Ps} [asked for|urged] calm.
- {P}, {N}, who was [visiting|passing through] from {T}, [said|felt] that [such things|this] could happen anywhere.
- In {T}, {N} miles away, {O} spent {M} crowns on {S} with the help of {P}.
- A [survey|report] by {O} [asked|questioned] {K} people in {T}, and {N} of them [agreed|had doubts].
- "[It will pass|We have seen worse|That is how it goes]," said {P}, a {R} who [knows|once worked at] {S}.
- {O} and {O} [will meet|are to meet] in {T} on {day} to discuss [what follows|the next steps] for {S}.
- {P} took over as {R} at {O} in {month} and has [kept a low profile|hired {N} people] since.
- [Last year|Two years ago] a [fire|flood|strike] at {S} in {T} cost {O} {M} crowns, {P} [recalled|said].
- The [road|bus] from {T} to {T} passes {S}, where {P} keeps a [shop|garden] with {N} [hens|roses].
- The government has [promised|set aside] {M} crowns for [such cases|the region]; {O} in {T} gets {N} per cent.
- {P} of {T} [came|had come] to see for {N} hours and met {R} {P} again, a cousin.
- An inquiry under {R} {P} [is due to report|will begin] in {month}, and {O} has [sent|handed over] {N} files.

~ [News|Word] of the {event} [spread|travelled] fast, and {P} of {O} in {T} [wrote|rang] within {N} minutes.
~ What the {event} means for others is [unclear|open], {R} {P} said.
~ The {event} [may be|could be] discussed again in {month}, when {body} [meets|reports].
~ {she} [did not say|would not say] more on the {event}, and {body} [had no comment|made no secret of its view].
~ "[We must wait|Time will tell|It is early days]," {she} said[| at the time].
~ For {body} the year had [begun|started] [quietly|badly], as a note from {month} shows.
~ The {role} has [heard|read] all of that before, {she} said.
~ Whether {spot} will change [soon|at all] depends on [others|the weather|the next weeks].
~ {body} will [say more|publish a report] on {day}, and {P} of {O} has been [invited|asked to speak].
~ {Ms} [thanked|mentioned] {P} after the {event}, and {Ps} [nodded|was pleased].
"""
OPENINGS = (
    "It began [quietly|with a telephone call] on {day}.",
    "[Few|Not many] had seen it coming.",
    "The [news|announcement] came [early|late] on {day}, as the {month} [rain|sun] set in.",
)
ELSEWHERE = ("In other news: ", "Elsewhere: ", "A separate story: ", "Earlier this week: ")
DAYS = "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday"
MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
ROLES = "baker|builder|historian|priest|gardener|pilot|tailor|student|librarian|economist|hairdresser|retired judge"
CHOICE, SLOT = re.compile(r"\[([^][]*)\]"), re.compile(r"\{(\w+)\}")
FACTS = {"who": "who", "Ms": "who", "org": "org", "town": "town", "site": "site", "num": "num"}  # slot -> fact
Pool = dict[str, list[str]]  # kind of thing -> names


@dataclass
class Kind:
    """A kind of news: words for its facts, its events (lead, summary, event), and its patterns."""

    orgs: list[str]
    roles: list[str]
    sites: list[str]
    number: str
    unit: str
    events: list[tuple[str, str, str]] = field(default_factory=list)
    again: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def marked_lines(text: str) -> Iterator[tuple[str, str]]:
    """(mark, text) of each pattern; a line that starts with a space continues the previous one."""
    for line in re.sub(r"\n +", " ", text).splitlines():
        if line:
            yield line[0], line[2:]


def read_kinds() -> list[Kind]:
    kinds: list[Kind] = []
    lead = ""
    for mark, text in marked_lines(NEWS):
        if mark == "*":
            _, orgs, roles, sites, number, unit = text.split("; ")
            kinds.append(Kind(orgs.split("|"), roles.split("|"), sites.split("|"), number, unit))
        elif mark == ">":
            lead = text
        elif mark == "=":
            event, summary = text.split(": ", 1)
            kinds[-1].events.append((lead, summary, event))
        else:
            (kinds[-1].again if mark == "+" else kinds[-1].others).append(text)
    return kinds


KINDS = read_kinds()
AGAIN, RECAPS, OTHERS, SHORT = ([text for mark, text in marked_lines(ANY_NEWS) if mark == wanted] for wanted in "+&-~")


def make_pools(seed: int = 7) -> dict[str, Pool]:
    """Names for the splits "train" and "test"; no name is in both, names two kinds of thing, or is a pattern's word."""
    pools: dict[str, Pool] = {"train": {}, "test": {}}
    taken = set(re.findall(r"[a-z]+", (NEWS + ANY_NEWS + "".join(OPENINGS)).lower()))
    rng = random.Random(seed)
    for kind, endings in ENDINGS.items():
        names = [
            onset + rime + ending for onset in ONSETS.split() for rime in RIMES.split() for ending in endings.split()
        ]
        names = [name for name in names if name.lower() not in taken]
        taken.update(name.lower() for name in names)
        rng.shuffle(names)
        cut = round(len(names) * TEST_SHARE)
        pools["test"][kind], pools["train"][kind] = names[:cut], names[cut:]
    return pools


POOLS = make_pools()


def make_number(rng: random.Random, sort: str) -> str:
    """A random number: "few" (two digits), "many" (three) or "money"."""
    if sort == "money":
        whole, part = rng.randint(11, 989), rng.randint(1, 9)
        return rng.choice((f"{whole},{part}00", f"{whole},000", f"{rng.randint(2, 98)}.{part}m"))
    return str(rng.randint(11, 98) if sort == "few" else rng.randint(101, 989))


def make_person(rng: random.Random, pool: Pool) -> tuple[str, str, str]:
    """(full name, short form, pronoun)."""
    she, surname = rng.choice(("she", "he")), rng.choice(pool["surname"])
    return f"{rng.choice(pool[she])} {surname}", f"{'Ms' if she == 'she' else 'Mr'} {surname}", she


def make_facts(rng: random.Random, pool: Pool, kind: Kind, event: str) -> dict[str, str]:
    """A story's facts by slot."""
    who, short, she = make_person(rng, pool)
    org, site = rng.choice(kind.orgs), rng.choice(kind.sites)
    return {
        "who": who,
        "Ms": short,
        "she": she,
        "her": "her" if she == "she" else "his",
        "him": "her" if she == "she" else "him",
        "role": rng.choice(kind.roles),
        "org": f"{rng.choice(pool['head'])} {org}",
        "body": f"the {org.split()[-1].lower()}",
        "town": rng.choice(pool["town"]),
        "site": f"{rng.choice(pool['head'])} {site}",
        "spot": f"the {site.split()[-1].lower()}",
        "num": make_number(rng, kind.number),
        "unit": kind.unit,
        "event": event,
    }


class Filler:
    """Fills the slots of one sentence: given facts, and invented values for capital slots, {day} and {month}."""

    def __init__(self, rng: random.Random, pool: Pool, facts: dict[str, str]):
        self.rng, self.pool, self.facts, self.short = rng, pool, facts, None

    def __call__(self, slot: re.Match) -> str:
        name, rng = slot[1], self.rng
        if name in self.facts:
            return self.facts[name]
        if name == "P" or (name == "Ps" and self.short is None):
            full, self.short, _ = make_person(rng, self.pool)
            return full
        if name == "Ps":
            return self.short
        if name in "OS":
            kind = rng.choice(KINDS)
            return f"{rng.choice(self.pool['head'])} {rng.choice(kind.orgs if name == 'O' else kind.sites)}"
        if name == "T":
            return rng.choice(self.pool["town"])
        if name in "NKM":
            return make_number(rng, {"N": "few", "K": "many", "M": "money"}[name])
        return rng.choice({"R": ROLES, "day": DAYS, "month": MONTHS}[name].split("|"))


def render(pattern: str, filler: Filler) -> str:
    """A sentence (or two) from a pattern."""
    text = CHOICE.sub(lambda choice: filler.rng.choice(choice[1].split("|")), pattern)
    text = SLOT.sub(filler, text)
    return re.sub(r"(^|\. )([a-z])", lambda start: start[1] + start[2].upper(), text)


def facts_of(pattern: str) -> set[str]:
    return {FACTS[slot] for slot in SLOT.findall(pattern) if slot in FACTS}


def make_story(rng: random.Random, pool: Pool, repeats: int, words: int, background: int) -> tuple[str, str]:
    """An article of at least `words` words, and its summary.

    The lead names the facts. Those that the summary needs are taken up again at least `repeats` times, among other
    people's, and summed up; the last `background` words or more do not name them, except for the odd "Ms Harrow".
    """
    kind = rng.choice(KINDS)
    lead, summary, event = rng.choice(kind.events)
    facts = make_facts(rng, pool, kind, event)
    sentences: list[str] = []
    again, others, short = kind.again + AGAIN, OTHERS.copy(), SHORT.copy()
    rng.shuffle(others)
    rng.shuffle(short)

    def say(pattern: str) -> None:
        sentences.append(render(pattern, Filler(rng, pool, facts)))

    def length() -> int:
        return sum(sentence.count(" ") + 1 for sentence in sentences)

    if rng.random() < 0.2:
        say(rng.choice(OPENINGS))
    say(lead)
    named = dict.fromkeys(sorted(facts_of(summary)), 0)
    while (fewest := min(named.values())) < repeats:
        wanted = {fact for fact, times in named.items() if times == fewest}
        pattern = rng.choice([pattern for pattern in again if facts_of(pattern) & wanted])
        again.remove(pattern)
        say(pattern)
        for fact in facts_of(pattern) & named.keys():
            named[fact] += 1
        if rng.random() < 0.3:
            say((others if rng.random() < 0.7 else short).pop())
    if repeats > 1 or rng.random() < 0.4:
        say(rng.choice(RECAPS))
    others += kind.others
    rng.shuffle(others)
    words = max(words, length() + background)
    while length() < words:
        draw = rng.random()
        if short and draw < 0.25:
            say(short.pop())
        elif others and draw < 0.9:
            say(others.pop())
        else:  # the lead of another story
            kind = rng.choice(KINDS)
            filler = Filler(rng, pool, make_facts(rng, pool, kind, event=""))
            sentences.append(render(rng.choice(ELSEWHERE) + rng.choice(kind.events)[0], filler))
    return " ".join(sentences), render(summary, Filler(rng, pool, facts))


def make_stories(rng: random.Random, pool: Pool, shots: int) -> list[tuple[str, str]]:
    """(article, summary) of `shots` short examples and then of the article to summarise."""
    stories = [make_story(rng, pool, 1, rng.randint(*SHOT_WORDS), 15) for _ in range(shots)]
    return [*stories, make_story(rng, pool, 2, rng.randint(*ARTICLE_WORDS), BACKGROUND_WORDS)]


def make_request(rng: random.Random, pool: Pool, shots: int) -> dict:
    *examples, (article, summary) = make_stories(rng, pool, shots)
    prompt = "".join(SHOT.format(article=text, summary=short) for text, short in examples)
    return {"article": prompt + PROMPT.format(article=article), "summary_gt": summary} | REQUEST


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--output-path",
        type=output_file,
        default=ROOT / "data/summarization/demo.jsonl",
        help="jsonl of requests to write (default: the bundled file)",
    )
    add("--requests", type=count, default=200, help="number of requests (default: %(default)s)")
    add(
        "--seed",
        type=seed,
        default=3,
        help="seed for the requests; it does not change which names are for tests (default: %(default)s)",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    rng = random.Random(args.seed)
    requests = [make_request(rng, POOLS["test"], rng.choice((1, 2))) for _ in range(args.requests)]
    used_in_training = {name for names in POOLS["train"].values() for name in names}
    for request in requests:
        assert not used_in_training & set(re.findall(r"[A-Z][a-z]+", request["article"] + request["summary_gt"]))
    try:
        args.output_path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(args.output_path, (json.dumps(request, sort_keys=True) + "\n" for request in requests))
    except OSError as error:
        raise InputError(f"--output-path {args.output_path}: cannot be written ({error.strerror})") from None
    print(f"{len(requests)} requests in {args.output_path}")


def main(argv: list[str] | None = None) -> int:
    """The exit status, see utils/cli.py."""
    return cli.run(lambda: run(parse_args(argv)), "nothing is written")


if __name__ == "__main__":
    sys.exit(main())

-- The ledger of batches' budgets in Redis: the same steps as src/quota/purse/register.rs, one call for many batches.
--
-- KEYS[1]  weir:quota:{<source>}; all other keys begin with it, so that a cluster keeps them together
-- ARGV[1]  the server's run id as this connection learned it: another one in the state = restart or failover
-- ARGV[2]  what is said, as JSON {read, all, told = {{batch, holder, granted, calls, seq}}, asks = {…}}
--
-- :batches    batch -> MessagePack {holder -> {granted, calls, seq, heard_at}}; '\n' -> {run, birth, opens_at}
-- :batches-at batches by the time at which they were touched last

local max, min, ceil = math.max, math.min, math.ceil
-- For so long a new state only listens; after so long without a word what somebody holds counts as spent.
local TELL, LAPSE = 5000000, 60000000
-- The least block; how many batches are remembered.
local LEAST, BATCHES = 8, 10000
-- No batch's name has a line's end.
local MADE = '\n'
local LEDGER, TOUCHED, CHANNEL = KEYS[1] .. ':batches', KEYS[1] .. ':batches-at', KEYS[1] .. ':hold'

local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000000 + tonumber(time[2])
local run, input = ARGV[1], cjson.decode(ARGV[2])

local function read(key)
  local packed = redis.call('HGET', LEDGER, key)
  return packed and cmsgpack.unpack(packed) or nil
end

local function write(key, value) redis.call('HSET', LEDGER, key, cmsgpack.pack(value)) end

-- The state, which is made anew if it is lost; one that a restarted server has kept may lack the last grants.
local made = read(MADE)
if not made or made.run ~= run then
  made = { run = run, birth = string.format('%.0f', now), opens_at = (not made and input.read) and now or now + TELL }
  write(MADE, made)
  redis.call('PUBLISH', CHANNEL, cjson.encode({ ledger = made.birth }))
end
local is_open = now >= made.opens_at

local batches, changed = {}, {}
local function parts_of(batch)
  if not batches[batch] then batches[batch] = read(batch) or {} end
  return batches[batch]
end

for _, word in ipairs(input.told) do
  local batch, holder, granted, calls, seq = word[1], word[2], word[3], word[4], word[5]
  local parts = parts_of(batch)
  local known = parts[holder]
  if not known then
    parts[holder] = { granted, calls, seq, now }
  elseif seq > known[3] then
    known[1], known[2], known[3] = granted, calls, seq
  elseif seq == known[3] then
    known[1], known[2] = max(known[1], granted), max(known[2], calls)
  end
  changed[batch] = true
end

local answers = {}
for number, ask in ipairs(input.asks) do
  local parts = parts_of(ask.batch)
  local held, made_calls, gone = 0, 0, 0
  for holder, other in pairs(parts) do
    if holder ~= ask.holder then
      held, made_calls = held + other[1], made_calls + other[2]
      gone = gone + (other[4] + LAPSE < now and other[1] or other[2])
    end
  end
  local own = parts[ask.holder] or { 0, 0, 0, now }
  parts[ask.holder], own[4], changed[ask.batch] = own, now, true
  -- A word that was overtaken by a later one changes nothing.
  if ask.seq > own[3] then
    local room = max(0, ask.allowed - held - ask.calls)
    local block = min(ask.want, room, max(LEAST, ceil(room / 4)))
    local granted, calls = own[1], own[2]
    own[1] = is_open and max(ask.keep, ask.calls + block) or ask.keep
    own[2], own[3] = ask.calls, ask.seq
    local is_news = own[1] ~= granted or own[2] ~= calls
    if is_news then redis.call('PUBLISH', CHANNEL, cjson.encode({ part = { ask.batch, ask.holder, own[1], own[2], own[3] } })) end
  end
  local is_spent = is_open and own[2] + gone >= ask.allowed
  answers[number] = { ask.batch, own[3], own[1], is_spent and 1 or 0, own[2] + made_calls }
end

for batch in pairs(changed) do
  write(batch, batches[batch])
  redis.call('ZADD', TOUCHED, string.format('%.0f', now), batch)
end
local over = redis.call('ZCARD', TOUCHED) - BATCHES
if over > 0 then
  for _, batch in ipairs(redis.call('ZRANGE', TOUCHED, 0, over - 1)) do
    redis.call('HDEL', LEDGER, batch)
    redis.call('ZREM', TOUCHED, batch)
  end
end

local all = {}
if input.all then
  local list = redis.call('HGETALL', LEDGER)
  for i = 1, #list, 2 do
    if list[i] ~= MADE then
      for holder, part in pairs(cmsgpack.unpack(list[i + 1])) do
        all[#all + 1] = { list[i], holder, part[1], part[2], part[3] }
      end
    end
  end
end
return { made.birth, answers, all }
